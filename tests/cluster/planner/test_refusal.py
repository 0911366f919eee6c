from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.planner.plan import PlanRequest, make_plan
from cluster.planner.refusal import refusal

RequestFor = Callable[..., PlanRequest]


@pytest.mark.parametrize(
    ("model", "gpu", "nodes", "rest", "expected"),
    [
        ("deepseek-v3", "h100-80g", 1, {}, ["88.0 GiB (fp8)", "71.6 GiB usable", "--gpu h200", "--nodes 2"]),
        ("grok-1", "h100-80g", 4, {}, ["8 experts make no more groups", "--quantization fp8"]),
        ("glam-1.2t", "a100-80g", 16, {"context": 512}, ["no tensor parallelism", "115.9 GiB", "--gpu"]),
        ("gpt-4-rumoured", "h200", 4, {"context": 8192, "quantization": "int8"}, ["one sequence of 8192", "GiB"]),
        ("deepseek-v3", "h200", 2, {"load": 20_000.0}, ["20,000 tokens/s are asked for", "--nodes"]),
        ("mixtral-8x7b", "l40s", 1, {"load": 1e9}, ["lower --context or --load"]),
    ],
)
def test_one_line_says_what_is_wrong_and_what_would_do(
    request_for: RequestFor, model: str, gpu: str, nodes: int, rest: dict[str, object], expected: list[str]
) -> None:
    line = refusal(make_plan(request_for(model, gpu, nodes, **rest)))
    assert "\n" not in line
    for part in (model, "does not fit", *expected):
        assert part in line
