from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.serving.attention_batch import AttentionBatch, Chunk
from cluster.serving.kv_cache import KVCache
from cluster.serving.moe_block import MoeBlock
from cluster.serving.skeleton import ModelSkeleton, load_skeleton

ROUTED = ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "kimi_k2"]
FALLBACK = ["olmoe", "gpt_oss"]
FALLBACK_SLOW = ["qwen2_moe", "glm4_moe", "granitemoe", "phimoe", "ernie4_5_moe"]
EVERY = [*ROUTED, *FALLBACK, *(pytest.param(family, marks=pytest.mark.slow) for family in FALLBACK_SLOW)]

Connect = Callable[[str], tuple[ModelSkeleton, Any]]


@torch.inference_mode()
def logits_in_chunks(skeleton: ModelSkeleton, prompts: list[torch.Tensor], sizes: list[int]) -> list[torch.Tensor]:
    """Logits of every position of every prompt, all prompts in one batch, chunk sizes taken in turn."""
    cache = KVCache(skeleton.kv_layout, memory=1 << 26, max_num_seqs=len(prompts), max_model_len=2048)
    slots = [cache.allocate(1) for _ in prompts]
    collected: list[list[torch.Tensor]] = [[] for _ in prompts]
    turn = 0
    while any(slot.length < len(prompt) for slot, prompt in zip(slots, prompts, strict=True)):
        chunks, members = [], []
        for index, (slot, prompt) in enumerate(zip(slots, prompts, strict=True)):
            num_tokens = min(sizes[turn % len(sizes)], len(prompt) - slot.length)
            turn += 1
            if num_tokens:
                assert cache.reserve(slot, slot.length + num_tokens)
                chunks.append(Chunk(slot=slot, num_tokens=num_tokens))
                members.append(index)
        batch = AttentionBatch(chunks, skeleton.device)
        ids, positions = [], []
        for position in batch.order:
            slot, prompt = chunks[position].slot, prompts[members[position]]
            ids.append(prompt[slot.length : slot.length + chunks[position].num_tokens])
            positions.append(torch.arange(slot.length, slot.length + chunks[position].num_tokens))
        logits = skeleton.forward(torch.cat(ids), torch.cat(positions), batch, torch.arange(batch.num_tokens))
        parts = logits.split([chunks[position].num_tokens for position in batch.order])
        for position, part in zip(batch.order, parts, strict=True):
            collected[members[position]].append(part)
            chunks[position].slot.length += chunks[position].num_tokens
    return [torch.cat(parts) for parts in collected]


@pytest.mark.parametrize("family", EVERY)
def test_logits_equal_transformers(family: str, connected_skeleton: Connect) -> None:
    skeleton, reference = connected_skeleton(family)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (length,), generator=generator) for length in (1, 5, 90, 300, 41)]
    ours = logits_in_chunks(skeleton, prompts, [1, 7, 64, 33, 200, 1, 1])
    for prompt, logits in zip(prompts, ours, strict=True):
        with torch.inference_mode():
            expected = reference(prompt[None]).logits[0]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", EVERY)
def test_holds_no_expert(
    family: str, tiny_checkpoint: Callable[[str], Path], reference_model: Callable[[str], Any]
) -> None:
    skeleton = load_skeleton(tiny_checkpoint(family), dtype=torch.float32, device=torch.device("cpu"))
    named = [*skeleton.model.named_parameters(), *skeleton.model.named_buffers()]
    assert not [name for name, _ in named if ".experts." in name]
    assert not [name for name, tensor in named if tensor.is_meta]
    reference = reference_model(family)
    experts = [m for name, m in reference.named_modules() if name.endswith(".experts")]
    assert experts
    expert_shapes = {tuple(p.shape) for module in experts for p in module.parameters()}
    assert not [name for name, tensor in named if tuple(tensor.shape) in expert_shapes and tensor.dim() == 3]
    blocks = [module for module in skeleton.model.modules() if isinstance(module, MoeBlock)]
    assert bool(blocks) == bool(skeleton.gates) == (family in ROUTED)
