from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.planner.caveats import warnings_of
from cluster.planner.plan import PlanRequest, make_plan

RequestFor = Callable[..., PlanRequest]


@pytest.mark.parametrize(
    ("model", "gpu", "nodes", "rest", "warning"),
    [
        ("gpt-4-rumoured", "b200", 2, {"quantization": "int4"}, "is a rumour"),
        ("switch-c", "h200", 8, {"context": 512}, "encoder-decoder"),
        ("deepseek-v3", "a100-80g", 8, {}, "widened to bf16"),
        ("deepseek-v3", "h100-80g", 2, {}, "share a node"),
        ("mixtral-8x7b", "h200", 16, {}, "every group runs"),
        ("glam-1.2t", "h200", 4, {"context": 1024}, "very few"),
    ],
)
def test_what_a_reader_should_know(
    request_for: RequestFor, model: str, gpu: str, nodes: int, rest: dict[str, object], warning: str
) -> None:
    assert any(warning in each for each in warnings_of(make_plan(request_for(model, gpu, nodes, **rest))))


def test_a_plan_without_surprises_has_no_warning(request_for: RequestFor) -> None:
    assert warnings_of(make_plan(request_for("deepseek-v3", "h200", 2))) == ()
