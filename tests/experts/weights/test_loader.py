"""Loading experts: transformers' numbers, only the bytes asked for, errors with file and tensor."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.errors import CheckpointError
from experts.ops.expert_mlp import expert_mlp_reference
from experts.ops.sort import sort_by_expert
from experts.spec import ExpertKey
from experts.weights.checkpoint import SINGLE_FILE, Checkpoint
from experts.weights.layout import describe_experts
from experts.weights.loader import load_experts

Make = Callable[..., tuple[Path, torch.nn.Module]]
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "phimoe", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_experts_compute_what_transformers_modules_do(tiny_checkpoint: Make, family: str) -> None:
    directory, model = tiny_checkpoint(family, sharded=True)
    checkpoint = Checkpoint(directory)
    layout = describe_experts(checkpoint, checkpoint.config())
    layer = 2
    keys = [ExpertKey(layer, expert) for expert in range(6)]
    weights_E = [loaded.weights for loaded in load_experts(checkpoint, layout, keys)]
    experts = next(m for name, m in model.named_modules() if name.endswith(f"layers.{layer}.mlp.experts"))
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(20, 32, generator=generator) * 3
    ids_TK = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(20)])
    weights_TK = torch.rand(20, 2, generator=generator)
    with torch.no_grad():
        expected = experts(hidden_TH, ids_TK, weights_TK)
    got = expert_mlp_reference(layout.spec, weights_E, hidden_TH, *sort_by_expert(ids_TK, weights_TK)[1:])
    torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_only_the_named_experts_are_read(tiny_checkpoint: Make, family: str) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family)[0])
    layout = describe_experts(checkpoint, checkpoint.config())
    assert checkpoint.bytes_read == 0
    keys = [ExpertKey(0, 3), ExpertKey(2, 5)]
    seen: list[tuple[int, int]] = []
    loaded = list(load_experts(checkpoint, layout, keys, lambda *bytes_: seen.append(bytes_)))
    values = 3 * 32 * 40 + ((2 * 40 + 32) if layout.spec.bias else 0)
    assert checkpoint.bytes_read == 2 * values * 4
    assert seen == [(values * 4, 2 * values * 4), (2 * values * 4, 2 * values * 4)]
    assert [expert.key for expert in loaded] == keys


def test_the_checksum_is_the_checkpoints_bytes(tiny_checkpoint: Make) -> None:
    directory, _ = tiny_checkpoint("mixtral")
    checkpoint = Checkpoint(directory)
    layout = describe_experts(checkpoint, checkpoint.config())
    (loaded,) = load_experts(checkpoint, layout, [ExpertKey(1, 4)])
    tensors = load_file(directory / SINGLE_FILE)
    stem = "model.layers.1.block_sparse_moe.experts.4"
    raw = b"".join(tensors[f"{stem}.{name}.weight"].numpy().tobytes() for name in ("w1", "w3", "w2"))
    assert loaded.checksum == zlib.crc32(raw)


def float8_checkpoint(directory: Path, intermediate: int, block: int) -> dict[str, torch.Tensor]:
    """Writes one expert as DeepSeek does; returns its weights widened element by element."""
    generator = torch.Generator().manual_seed(0)
    tensors, wide = {}, {}
    for name, shape in (
        ("gate_proj", (intermediate, 160)),
        ("up_proj", (intermediate, 160)),
        ("down_proj", (160, intermediate)),
    ):
        values = torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)
        scale = torch.rand(-(-shape[0] // block), -(-shape[1] // block), generator=generator) + 0.5
        stem = f"model.layers.0.mlp.experts.0.{name}.weight"
        tensors[stem], tensors[f"{stem}_scale_inv"] = values, scale
        rows, columns = torch.arange(shape[0]) // block, torch.arange(shape[1]) // block
        wide[name] = values.float() * scale[rows][:, columns]
    save_file(tensors, directory / SINGLE_FILE)
    quantization = {"quant_method": "fp8", "weight_block_size": [block, block]}
    (directory / "config.json").write_text(json.dumps({"hidden_size": 160, "quantization_config": quantization}))
    return wide


@pytest.mark.parametrize(("intermediate", "block", "kept"), [(256, 128, True), (200, 128, False), (256, 64, False)])
def test_float8_checkpoints(tmp_path: Path, intermediate: int, block: int, kept: bool) -> None:
    wide = float8_checkpoint(tmp_path, intermediate, block)
    checkpoint = Checkpoint(tmp_path)
    layout = describe_experts(checkpoint, checkpoint.config())
    assert layout.scale_block == (block, block)
    ((_, weights, _),) = load_experts(checkpoint, layout, [ExpertKey(0, 0)])
    up, down = weights.up_2IH, weights.down_HI
    assert (up.dtype is torch.float8_e4m3fn) is kept
    if kept:
        assert weights.up_scale is not None
        assert weights.down_scale is not None
        up = up.float() * weights.up_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :160]
        down = down.float() * weights.down_scale.repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)
    torch.testing.assert_close(up, torch.cat([wide["gate_proj"], wide["up_proj"]]), rtol=0, atol=0)
    torch.testing.assert_close(down, wide["down_proj"], rtol=0, atol=0)


def test_a_missing_tensor_is_named(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint("mixtral")
    tensors = load_file(directory / SINGLE_FILE)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    del tensors[name]
    save_file(tensors, tmp_path / SINGLE_FILE)
    checkpoint = Checkpoint(tmp_path)
    layout = describe_experts(checkpoint, {"hidden_size": 32})
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is in none"):
        list(load_experts(checkpoint, layout, [ExpertKey(1, 2)]))


def test_a_misshapen_tensor_is_named(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint("mixtral")
    tensors = load_file(directory / SINGLE_FILE)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    tensors[name] = torch.zeros(31, 40)
    save_file(tensors, tmp_path / SINGLE_FILE)
    checkpoint = Checkpoint(tmp_path)
    layout = describe_experts(checkpoint, {"hidden_size": 32})
    message = rf"{SINGLE_FILE}: tensor '{name}' has shape \[31, 40\], but \[32, 40\] is expected"
    with pytest.raises(CheckpointError, match=message):
        list(load_experts(checkpoint, layout, [ExpertKey(1, 2)]))


def test_an_expert_that_is_not_there_is_refused(tiny_checkpoint: Make) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("mixtral")[0])
    layout = describe_experts(checkpoint, checkpoint.config())
    with pytest.raises(CheckpointError, match="no expert 6 in layer 0"):
        list(load_experts(checkpoint, layout, [ExpertKey(0, 6)]))
