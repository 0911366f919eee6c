from __future__ import annotations

from collections.abc import Callable

from cluster.planner.plan import PlanRequest, make_plan

RequestFor = Callable[..., PlanRequest]


def test_latent_attention_caches_the_latent(request_for: RequestFor) -> None:
    memory = make_plan(request_for("deepseek-v3", "h200", 2)).memory
    assert memory.kv_bytes_per_token == 61 * (512 + 64) * 2  # DeepSeek-V3 report: 70 KB a token


def test_grouped_query_attention_caches_keys_and_values(request_for: RequestFor) -> None:
    memory = make_plan(request_for("mixtral-8x7b", "h200", 1)).memory
    assert memory.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2


def test_a_group_holds_its_share_of_every_layer(request_for: RequestFor) -> None:
    plan = make_plan(request_for("deepseek-v3", "h200", 2))
    assert plan.memory.expert_weights * plan.split.groups == plan.expert_bytes
    assert plan.memory.sequences(4096) == plan.memory.kv_cache // (4096 * plan.memory.kv_bytes_per_token)


def test_an_engine_holds_all_but_the_experts_at_the_models_dtype(request_for: RequestFor) -> None:
    plan = make_plan(request_for("deepseek-v3", "h200", 2))
    assert plan.memory.engine_weights == 2 * (plan.counts.total - plan.counts.routed_experts)
