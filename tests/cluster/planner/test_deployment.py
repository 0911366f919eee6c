from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.planner.deployment import deployment_numbers
from cluster.planner.plan import PlanRequest, make_plan

RequestFor = Callable[..., PlanRequest]


@pytest.mark.parametrize(
    ("model", "gpu", "nodes"),
    [
        ("mixtral-8x7b", "h100-80g", 1),
        ("mixtral-8x22b", "h100-80g", 2),
        ("deepseek-v3", "h100-80g", 4),
        ("deepseek-v3", "h200", 2),
        ("kimi-k2", "h200", 2),
    ],
)
def test_numbers_add_up_to_the_hardware_and_hold_the_model(
    request_for: RequestFor, model: str, gpu: str, nodes: int
) -> None:
    plan = make_plan(request_for(model, gpu, nodes))
    numbers = deployment_numbers(plan)
    engine, experts = numbers.engine, numbers.experts
    assert engine.replicas * engine.gpus_per_pod == numbers.engine_replicas
    assert experts.replicas * experts.gpus_per_pod == numbers.expert_groups * numbers.group_replicas
    assert numbers.engine_replicas + numbers.expert_groups * numbers.group_replicas == plan.gpus
    slots = numbers.expert_groups * plan.split.slots_per_group
    assert slots == plan.request.model.architecture.num_experts + numbers.num_redundant_experts
    assert experts.memory_gib_per_pod * 2**30 > experts.gpus_per_pod * plan.memory.expert_weights
    assert 0 < engine.shm_gib_per_pod < engine.memory_gib_per_pod
    assert plan.memory.engine_weights + numbers.kv_cache_memory <= plan.memory.usable
    assert numbers.max_num_seqs * 4096 * plan.memory.kv_bytes_per_token <= numbers.kv_cache_memory + 2**30


def test_amd_cards_are_another_resource(request_for: RequestFor) -> None:
    assert deployment_numbers(make_plan(request_for("deepseek-v3", "mi300x", 1))).experts.gpu_resource == "amd.com/gpu"
