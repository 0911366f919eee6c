from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.planner.models import model_presets
from cluster.planner.plan import PlanRequest, make_plan
from cluster.planner.summary import summarize
from experts.errors import ConfigError

RequestFor = Callable[..., PlanRequest]


@pytest.mark.parametrize(("gpu", "nodes"), [("h200", 2), ("h100-80g", 4)])
def test_deepseek_v3_fits_with_its_cache_for_a_load(request_for: RequestFor, gpu: str, nodes: int) -> None:
    plan = make_plan(request_for("deepseek-v3", gpu, nodes, load=2000.0, context=8192))
    assert plan.fits
    assert plan.scheme.name == "fp8"
    assert plan.tokens_per_second >= 2000
    assert plan.split.whole_nodes
    memory = plan.memory
    assert memory.expert_weights <= memory.usable
    cache = plan.sequences * 8192 * memory.kv_bytes_per_token
    assert memory.engine_weights + cache <= memory.usable
    assert plan.bytes_per_gpu <= memory.usable


def test_deepseek_v3_does_not_fit_eight_h100(request_for: RequestFor) -> None:
    plan = make_plan(request_for("deepseek-v3", "h100-80g", 1))
    assert not plan.fits
    assert plan.binding_constraint == "expert_memory"


def test_the_fewest_sequences_that_give_the_load(request_for: RequestFor) -> None:
    plan = make_plan(request_for("deepseek-v3", "h200", 2, load=3000.0))
    assert plan.tokens_per_second >= 3000
    fewer = make_plan(request_for("deepseek-v3", "h200", 2, max_num_seqs=plan.sequences - 1))
    assert fewer.split == plan.split
    assert fewer.tokens_per_second < 3000


@pytest.mark.parametrize(
    ("model", "gpu", "nodes", "rest", "obstacle"),
    [
        ("grok-1", "h100-80g", 4, {}, "expert_memory"),  # eight experts make no more than eight groups
        ("glam-1.2t", "a100-80g", 16, {"context": 512}, "engine_memory"),
        ("mixtral-8x7b", "l40s", 2, {"context": 32768, "quantization": "int4"}, None),
        ("gpt-4-rumoured", "b200", 4, {"context": 8192, "quantization": "int8"}, None),
        ("gpt-4-rumoured", "h200", 4, {"context": 8192, "quantization": "int8"}, "kv_cache"),
        ("deepseek-v3", "h200", 2, {"load": 1e6}, "load"),
    ],
)
def test_what_stops_it(
    request_for: RequestFor, model: str, gpu: str, nodes: int, rest: dict[str, object], obstacle: str | None
) -> None:
    plan = make_plan(request_for(model, gpu, nodes, **rest))
    assert plan.fits == (obstacle is None)
    if obstacle is not None:
        assert plan.binding_constraint == obstacle


def test_a_cache_that_limits_the_batch_is_what_binds(request_for: RequestFor) -> None:
    plan = make_plan(request_for("mixtral-8x22b", "h100-80g", 1))
    assert plan.sequences == plan.memory.sequences(4096) < 256
    assert plan.binding_constraint == "kv_cache"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "--nodes 0"),
        ({"nodes": 100_000}, "at most 8192 GPUs"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1"),
        ({"gpus_per_node": 1}, "1 GPU"),
        ({"context": 0}, "--context 0"),
        ({"context": 200_000}, "positions for 163840"),
        ({"load": 0.0}, "--load 0"),
        ({"load": float("nan")}, "--load nan"),
        ({"max_num_seqs": 0}, "--max-num-seqs 0"),
    ],
)
def test_an_impossible_request_is_refused(request_for: RequestFor, changes: dict[str, object], message: str) -> None:
    request = replace(request_for("deepseek-v3", "h200", 1), **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        make_plan(request)


def test_every_preset_plans_on_every_scale(request_for: RequestFor) -> None:
    for model in model_presets():
        for nodes in (1, 3, 8):
            plan = make_plan(request_for(model, "b200", nodes, context=512))
            assert plan.fits == (plan.binding_constraint not in ("expert_memory", "engine_memory"))
            assert plan.split.engine_gpus + plan.split.expert_gpus == 8 * nodes


def test_forty_nodes_take_well_under_two_seconds(request_for: RequestFor) -> None:
    """With advice, warnings and all; CPU time, so that a busy machine does not matter."""
    started = time.process_time()
    summary = summarize(make_plan(request_for("deepseek-v3", "h100-80g", 40)), 2.0)
    assert time.process_time() - started < 2.0
    assert summary["gpus"] == 320
