from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.serving import attention
from cluster.serving.attention_batch import AttentionBatch, Chunk
from cluster.serving.kv_cache import KVCache
from cluster.serving.moe_block import MoeBlock
from cluster.serving.skeleton import ModelSkeleton, load_skeleton
from experts.errors import CheckpointError

ROUTED = ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "kimi_k2", "grok-1"]
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


def test_scores_in_parts_are_the_same(connected_skeleton: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton, reference = connected_skeleton("gpt_oss")
    prompt = torch.arange(100)
    monkeypatch.setattr(attention, "_MAX_SCORES", 4 * 100 * 7)
    (logits,) = logits_in_chunks(skeleton, [prompt], [60, 40])
    with torch.inference_mode():
        torch.testing.assert_close(logits, reference(prompt[None]).logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_bfloat16_is_as_close_as_transformers_own(
    family: str,
    tiny_checkpoint: Callable[[str], Path],
    connected_skeleton: Connect,
    reference_router: Callable[..., Any],
) -> None:
    _, reference = connected_skeleton(family)
    rounded = copy.deepcopy(reference).to(torch.bfloat16)
    skeleton = load_skeleton(tiny_checkpoint(family), dtype=torch.bfloat16, device=torch.device("cpu"))
    skeleton.connect(reference_router(rounded, dict(skeleton.gates)))
    prompt = torch.arange(60)
    (logits,) = logits_in_chunks(skeleton, [prompt], [25, 1, 34])
    with torch.inference_mode():
        expected, theirs = reference(prompt[None]).logits[0], rounded(prompt[None]).logits[0].float()
    # The median, because rounding flips an expert here and there, in theirs as in ours.
    assert (logits - expected).abs().median() <= 1.5 * (theirs - expected).abs().median()


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


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copy_of(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """family -> a copy of its tiny checkpoint that a test may spoil."""
    return lambda family: Path(shutil.copytree(tiny_checkpoint(family), tmp_path / family))


def load(directory: Path) -> ModelSkeleton:
    return load_skeleton(directory, dtype=torch.float32, device=torch.device("cpu"))


@torch.inference_mode()
def test_fp8_weights_are_widened(copy_of: Callable[[str], Path], connected_skeleton: Connect) -> None:
    directory = copy_of("deepseek_v3")
    tensors = load_file(directory / "model.safetensors")
    block = 16
    for name in [name for name in tensors if name.endswith("_proj.weight") and ".experts." not in name]:
        weight_NK = tensors[name]
        rows, columns = (-(-size // block) for size in weight_NK.shape)
        scale = torch.rand(rows, columns) + 0.5
        scale_NK = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[
            : weight_NK.shape[0], : weight_NK.shape[1]
        ]
        quantised_NK = (weight_NK / scale_NK).to(torch.float8_e4m3fn)
        tensors[name], tensors[name + "_scale_inv"] = quantised_NK, scale
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, quantization_config={"quant_method": "fp8", "weight_block_size": [block, block]})
    plain, reference = connected_skeleton("deepseek_v3")
    skeleton = load(directory)
    assert plain.connection.router is not None
    skeleton.connect(plain.connection.router)
    prompt = torch.arange(40)
    (logits,) = logits_in_chunks(skeleton, [prompt], [40])
    # Widened by hand into transformers' own model.
    state = reference.state_dict()
    widened = copy.deepcopy(reference)
    for name, scale in tensors.items():
        if name.endswith("_scale_inv"):
            weight = name.removesuffix("_scale_inv")
            scale_NK = torch.kron(scale, torch.ones(block, block))[: state[weight].shape[0], : state[weight].shape[1]]
            widened.get_parameter(weight).data = tensors[weight].float() * scale_NK
    torch.testing.assert_close(logits, widened(prompt[None]).logits[0], rtol=0, atol=1e-4)
    assert not torch.allclose(logits, reference(prompt[None]).logits[0], atol=1e-2)


def test_a_missing_tensor_is_named(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("mixtral")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight"):
        load(directory)


def test_a_mis_shaped_tensor_is_refused(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("mixtral")
    edit_config(directory, hidden_size=128)
    with pytest.raises(CheckpointError, match="do not fit"):
        load(directory)


def test_code_in_a_checkpoint_is_not_run(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("kimi_k2")
    (directory / "modeling_deepseek.py").write_text("raise SystemExit")
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"})
    assert type(load(directory).model).__module__.startswith("transformers.")


def test_end_tokens_come_from_the_generation_config(copy_of: Callable[[str], Path]) -> None:
    directory = copy_of("mixtral")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert load(directory).eos_token_ids == {1, 2}
    (directory / "generation_config.json").unlink()
    assert load(directory).eos_token_ids == {257}
