"""Layouts read off the checkpoints of transformers' families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.errors import CheckpointError
from experts.spec import ExpertSpec
from experts.weights.checkpoint import SINGLE_FILE, Checkpoint
from experts.weights.layout import describe_experts

Make = Callable[..., tuple[Path, object]]


@pytest.mark.parametrize(
    ("family", "layers", "intermediate_size"),
    [
        ("mixtral", (0, 1, 2), 40),
        ("qwen3_moe", (0, 1, 2), 24),
        ("deepseek_v2", (1, 2), 24),
        ("deepseek_v3", (1, 2), 24),
        ("olmoe", (0, 1, 2), 40),
        ("phimoe", (0, 1, 2), 40),
    ],
)
def test_per_expert_families(
    tiny_checkpoint: Make, family: str, layers: tuple[int, ...], intermediate_size: int
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint(family)[0])
    layout = describe_experts(checkpoint, checkpoint.config())
    assert layout.spec == ExpertSpec(hidden_size=32, intermediate_size=intermediate_size)
    assert layout.experts_per_layer == dict.fromkeys(layers, 6)
    assert layout.num_experts == 6 * len(layers)
    assert not layout.fused


def test_gpt_oss(tiny_checkpoint: Make) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("gpt_oss")[0])
    layout = describe_experts(checkpoint, checkpoint.config())
    assert layout.spec == ExpertSpec(
        hidden_size=32, intermediate_size=40, activation="quick_gelu", bias=True, limit=7.0, up_shift=1.0
    )
    assert (layout.fused, layout.transposed, layout.interleaved) == (True, True, True)
    assert layout.experts_per_layer == {0: 6, 1: 6, 2: 6}


def test_prediction_layers_are_left_out(tiny_checkpoint: Make) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("deepseek_v3")[0])
    layout = describe_experts(checkpoint, {**checkpoint.config(), "num_hidden_layers": 2})
    assert layout.experts_per_layer == {1: 6}


def test_switch_names_count_decoder_layers_after_the_encoder(tmp_path: Path) -> None:
    tensors = {}
    for side in ("encoder", "decoder"):
        for expert in range(2):
            stem = f"{side}.block.1.layer.{1 if side == 'encoder' else 2}.mlp.experts.expert_{expert}"
            tensors[f"{stem}.wi.weight"] = torch.zeros(6, 4)
            tensors[f"{stem}.wo.weight"] = torch.zeros(4, 6)
    save_file(tensors, tmp_path / SINGLE_FILE)
    layout = describe_experts(
        Checkpoint(tmp_path), {"d_model": 4, "num_layers": 2, "dense_act_fn": "relu", "num_hidden_layers": 2}
    )
    assert layout.experts_per_layer == {1: 2, 3: 2}
    assert layout.spec == ExpertSpec(hidden_size=4, intermediate_size=6, activation="relu", gated=False)


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_orientation_is_read_off_the_shapes(tmp_path: Path, transposed: bool) -> None:
    up, down = torch.zeros(2, 8, 8), torch.zeros(2, 8, 4)  # hidden 8 = twice intermediate 4
    if transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    prefix = "model.layers.0.mlp.experts"
    save_file({f"{prefix}.gate_up_proj": up, f"{prefix}.down_proj": down}, tmp_path / SINGLE_FILE)
    layout = describe_experts(Checkpoint(tmp_path), {"hidden_size": 8})
    assert (layout.transposed, layout.spec.intermediate_size) == (transposed, 4)


def edit(directory: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Checkpoint:
    tensors = load_file(directory / SINGLE_FILE)
    change(tensors)
    save_file(tensors, tmp_path / SINGLE_FILE)
    return Checkpoint(tmp_path)


def test_a_gap_in_the_experts_is_named(tiny_checkpoint: Make, tmp_path: Path) -> None:
    directory, _ = tiny_checkpoint("qwen3_moe")
    config = json.loads((directory / "config.json").read_text())
    stem = "model.layers.1.mlp.experts.2"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{stem}.")]:
            del tensors[name]

    with pytest.raises(CheckpointError, match=f"layer 1 has expert 5 and no expert 2 .tensor {stem}"):
        describe_experts(edit(directory, tmp_path, drop), config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 33}, "config.json says hidden_size 33"),
        ({"hidden_act": "mish"}, "activation 'mish' is not known; known are silu"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quant_method 'mxfp4'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tiny_checkpoint: Make, config: dict[str, object], message: str) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("qwen3_moe")[0])
    with pytest.raises(CheckpointError, match=message):
        describe_experts(checkpoint, {**checkpoint.config(), **config})


def test_a_dense_model_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "experts" in name]:
            del tensors[name]

    checkpoint = edit(tiny_checkpoint("qwen3_moe")[0], tmp_path, drop)
    with pytest.raises(CheckpointError, match="not a Mixture-of-Experts checkpoint"):
        describe_experts(checkpoint, {})
