"""Every family that is said to be served, from checkpoint to logits: skeleton, router and groups in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from cluster.serving.attention_batch import AttentionBatch, Chunk
from cluster.serving.kv_cache import KVCache
from cluster.serving.skeleton import load_skeleton
from experts.group import ExpertGroup
from experts.ops.backend import build_backend
from experts.spec import ExpertKey
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts
from router_service.gating.gate import Gate
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.transport.in_process import InProcessTransport

CPU = torch.device("cpu")
QUICK = ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "kimi_k2", "grok-1", "gpt_oss"]
SLOW = [
    "olmoe",
    "qwen2_moe",
    "glm4_moe",
    "granitemoe",
    "phimoe",
    "ernie4_5_moe",
]


def connected_router(checkpoint: Checkpoint, gates: Mapping[int, Gate], num_groups: int) -> Router:
    layout = describe_experts(checkpoint, checkpoint.config())
    holders = balanced(layout.experts_per_layer, num_groups, nodes_of_groups=None)
    groups = {}
    for number in range(num_groups):
        backend = build_backend(layout.spec, device=CPU, dtype=torch.float32, quantization="none", num_threads=1)
        groups[f"g{number}"] = ExpertGroup(number, layout.spec, backend)
        keys = [ExpertKey(layer, e) for layer, held in holders.items() for e, by in enumerate(held) if number in by]
        groups[f"g{number}"].assign(layout, checkpoint, keys)
    replicas = tuple(GroupReplica(group=n, replica=name, node="here", address="") for n, name in enumerate(groups))
    router = Router(InProcessTransport(groups), gates, recovery_timeout_s=5)
    router.update(PlacementTable(version=1, num_groups=num_groups, holders=holders, replicas=replicas))
    return router


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
@torch.inference_mode()
def test_logits_equal_transformers(family: str, tiny_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family))
    skeleton = load_skeleton(checkpoint, dtype=torch.float32, device=CPU)
    config = None
    if family == "kimi_k2":  # DeepSeek-V3 under another name, which transformers does not know
        config = DeepseekV3Config.from_dict({**checkpoint.config(), "model_type": "deepseek_v3"})
        assert config.n_routed_experts == 384
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory,
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    prompt = torch.randint(0, 256, (80,), generator=torch.Generator().manual_seed(2))
    expected = reference(prompt[None]).logits[0]
    for num_groups in (1, 2, 4):
        skeleton.connect(connected_router(checkpoint, skeleton.gates, num_groups))
        cache = KVCache(skeleton.kv_layout, memory=1 << 24, max_num_seqs=1, max_model_len=512)
        slot = cache.allocate(len(prompt))
        assert slot is not None
        batch = AttentionBatch([Chunk(slot=slot, num_tokens=len(prompt))], CPU)
        positions = torch.arange(len(prompt))
        logits = skeleton.forward(prompt, positions, batch, positions)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
