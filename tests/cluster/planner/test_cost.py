from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.planner.cost import dollars_per_million_tokens
from cluster.planner.plan import PlanRequest, make_plan

RequestFor = Callable[..., PlanRequest]


def test_a_million_tokens(request_for: RequestFor) -> None:
    plan = make_plan(request_for("mixtral-8x7b", "h100-80g", 1))
    hours = 1e6 / plan.tokens_per_second / 3600
    assert dollars_per_million_tokens(plan, 2.0) == pytest.approx(8 * 2.0 * hours)
    assert dollars_per_million_tokens(plan, None) is None
