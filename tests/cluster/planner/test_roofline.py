from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cluster.planner.assumptions import ASSUMPTIONS
from cluster.planner.hardware import find_interconnect
from cluster.planner.plan import PlanRequest, make_plan

RequestFor = Callable[..., PlanRequest]


def test_the_parts_of_a_step_add_up(request_for: RequestFor) -> None:
    plan = make_plan(request_for("deepseek-v3", "h100-80g", 4))
    assert sum(plan.decode.parts().values()) == pytest.approx(plan.decode.total)
    assert min(plan.decode.parts().values()) >= 0


def test_one_sequence_by_hand(request_for: RequestFor) -> None:
    """One engine decodes one sequence: memory bandwidth bounds everything."""
    plan = make_plan(request_for("mixtral-8x7b", "h200", 1, 2, max_num_seqs=1, context=1000))
    assert plan.split.engine_gpus == plan.split.groups == 1
    bandwidth = 4.8e12 * ASSUMPTIONS.memory_efficiency
    engine_weights = plan.counts.engine - plan.counts.input_embedding
    cache = 1000 * 32 * 2 * 8 * 128
    assert plan.decode.engine_bandwidth == pytest.approx(2 * (engine_weights + cache) / bandwidth)
    two_experts_a_layer = 32 * 2 * 3 * 4096 * 14336
    assert plan.decode.expert_bandwidth == pytest.approx(2 * two_experts_a_layer / bandwidth)
    assert plan.decode.experts_hit_per_group == pytest.approx(2)
    there_and_back = 32 * 2 * 4096 * 2 / ASSUMPTIONS.stream_bytes_per_s
    assert plan.decode.dispatch_bandwidth == pytest.approx(there_and_back)
    assert plan.decode.dispatch_latency == pytest.approx(32 * ASSUMPTIONS.transport_latency_s)
    assert plan.tokens_per_second == pytest.approx(1 / plan.decode.total)


def test_distinct_experts_hit_saturate_with_the_batch(request_for: RequestFor) -> None:
    hit = [
        make_plan(request_for("deepseek-v3", "h200", 2, max_num_seqs=n)).decode.experts_hit_per_group
        for n in (1, 8, 64, 256)
    ]
    assert hit == sorted(hit)
    assert hit[0] == pytest.approx(32 * (1 - (1 - 8 / 256) ** 8))
    assert hit[-1] == pytest.approx(32, rel=1e-3)


def test_prefill_is_bound_by_more_than_bandwidth(request_for: RequestFor) -> None:
    plan = make_plan(request_for("deepseek-v3", "h100-80g", 4))
    assert plan.prefill.expert_compute > 0 == plan.prefill.expert_bandwidth
    assert plan.prefill_tokens_per_second > plan.tokens_per_second


def test_slow_wires_bind(request_for: RequestFor) -> None:
    fast = request_for("kimi-k2", "h100-80g", 4)
    slow = replace(fast, interconnect=find_interconnect("ethernet-25g"))
    assert make_plan(slow).decode.dispatch_bandwidth > 2 * make_plan(fast).decode.dispatch_bandwidth
