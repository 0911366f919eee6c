from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.planner.hardware import find_gpu, find_interconnect
from cluster.planner.models import find_model
from cluster.planner.plan import PlanRequest


@pytest.fixture
def request_for() -> Callable[..., PlanRequest]:
    """`request_for("deepseek-v3", "h200", 2, context=8192)`: 2 nodes of 8."""

    def build(model: str, gpu: str, nodes: int, gpus_per_node: int = 8, **rest: object) -> PlanRequest:
        card = find_gpu(gpu)
        return PlanRequest(
            model=find_model(model),
            gpu=card,
            interconnect=find_interconnect(card.interconnect),
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            **rest,  # type: ignore[arg-type]
        )

    return build
