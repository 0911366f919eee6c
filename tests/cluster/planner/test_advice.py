from __future__ import annotations

from collections.abc import Callable

from cluster.planner.advice import cheapest_lift, smallest_that_fits
from cluster.planner.plan import PlanRequest, make_plan

RequestFor = Callable[..., PlanRequest]


def test_the_smallest_that_fits_is_the_smallest(request_for: RequestFor) -> None:
    changes = smallest_that_fits(make_plan(request_for("deepseek-v3", "h100-80g", 1)))
    assert all(change.plan.fits for change in changes)
    assert [change.plan.gpus for change in changes] == sorted(change.plan.gpus for change in changes)
    by_flag = {change.flag: change for change in changes}
    assert "--quantization int4" in by_flag
    assert "--gpu h200 --nodes 1 --gpus-per-node 8" in by_flag
    assert "--nodes 2 --gpus-per-node 8" in by_flag


def test_more_nodes_are_not_advised_where_they_cannot_help(request_for: RequestFor) -> None:
    """Grok-1 has eight experts a layer: more than eight groups are not to be had."""
    for change in smallest_that_fits(make_plan(request_for("grok-1", "h100-80g", 4))):
        assert change.plan.request.gpu.name != "h100-80g" or change.plan.request.quantization != "none"


def test_two_changes_where_one_is_not_enough(request_for: RequestFor) -> None:
    plan = make_plan(request_for("gpt-4-rumoured", "b200", 1))
    changes = smallest_that_fits(plan)
    assert changes
    assert all("--quantization" in change.flag and "--nodes" in change.flag for change in changes)


def test_the_lift_gives_more_for_the_fewest_gpus(request_for: RequestFor) -> None:
    plan = make_plan(request_for("deepseek-v3", "h100-80g", 4))
    lift = cheapest_lift(plan)
    assert lift is not None
    assert lift.plan.fits
    assert lift.plan.gpus == plan.gpus  # a flag is enough here
    assert lift.plan.tokens_per_second > 1.05 * plan.tokens_per_second
    assert lift.flag in str(lift)
