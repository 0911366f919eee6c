"""The emulation beside what it emulates: the kernels themselves, on a card or in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.bench.emulated_backend import EmulatedBackend
from experts.ops import known_cards
from experts.ops._triton import grouped_matmul
from experts.ops._triton.quantise_rows import quantise_rows_reference
from experts.ops.expert_mlp import expert_mlp_reference
from experts.ops.tile_config import TileConfig
from experts.ops.triton_backend import TritonBackend
from experts.quant.fp8_block import Fp8Block
from experts.quant.schemes import build_scheme
from experts.quant.unquantised import Unquantised
from experts.spec import ExpertSpec, ExpertWeights

# Intermediate size: no multiple of 128, so that gate and up would share a block if they were quantised as one.
SPEC = ExpertSpec(hidden_size=136, intermediate_size=96, bias=True)
OFFSETS_S1 = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
TOKEN_ROWS_R = torch.tensor([0, 1, 4, 0, 1, 2, 3, 4], dtype=torch.int32)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One small tile in the interpreter, which also rounds float32 to fp8 wrongly: activations in torch there."""
    monkeypatch.setenv("EXPERTMESH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(TritonBackend, "warm", lambda self, slot: None)
    if not torch.cuda.is_available():
        tile = TileConfig(kernel="decode", rows=16, columns=64, depth=128, warps=4, stages=2)
        buckets = dict.fromkeys(known_cards.ROW_BUCKETS, (tile,))
        schemes = dict.fromkeys(("none", "fp8", "fp8_block", "int8", "int4"), buckets)
        monkeypatch.setattr(known_cards, "KNOWN_CARDS", {"interpreter": schemes})
        monkeypatch.setattr(grouped_matmul, "quantise_rows", quantise_rows_reference)


def experts(generator: torch.Generator) -> list[ExpertWeights]:
    h, i = SPEC.hidden_size, SPEC.intermediate_size
    return [
        ExpertWeights(
            up_2IH=torch.randn(2 * i, h, generator=generator) / h**0.5,
            down_HI=torch.randn(h, i, generator=generator) / i**0.5,
            up_bias_2I=torch.randn(2 * i, generator=generator),
            down_bias_H=torch.randn(h, generator=generator),
        )
        for _ in range(3)
    ]


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", ["none", "fp8", "fp8_block", "int8", "int4"])
def test_rounds_as_the_kernels_do(scheme: str) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    kernels = TritonBackend(SPEC, device=device, dtype=torch.float16, quantization=scheme)
    emulated = EmulatedBackend(SPEC, build_scheme(scheme, torch.float16), dtype=torch.float16)
    held = experts(generator)
    for slot, weights in enumerate(held):
        kernels.load(slot, weights)
        emulated.load(slot, weights)
    hidden_TH = torch.randn(5, SPEC.hidden_size, generator=generator)
    hidden_TH[3] *= 10  # a scale of its own
    call = (hidden_TH, torch.arange(3, dtype=torch.int32), OFFSETS_S1, TOKEN_ROWS_R, torch.rand(8, generator=generator))
    out_TH = emulated.forward(*call)
    exact_TH = expert_mlp_reference(SPEC, held, *call[:1], *call[2:], dtype=torch.float32)
    rounding = relative_error(out_TH, exact_TH)
    assert relative_error(out_TH, kernels.forward(*call)) < (1e-3 if scheme == "none" else rounding / 10)
    assert scheme == "none" or 2e-3 < rounding < 0.2


def test_without_roundings_it_is_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    emulated = EmulatedBackend(SPEC, Unquantised(torch.float32), dtype=torch.float32)
    held = experts(generator)
    for slot, weights in enumerate(held):
        emulated.load(slot, weights)
    hidden_TH, weights_R = torch.randn(5, SPEC.hidden_size, generator=generator), torch.rand(8, generator=generator)
    out_TH = emulated.forward(hidden_TH, torch.arange(3, dtype=torch.int32), OFFSETS_S1, TOKEN_ROWS_R, weights_R)
    expected_TH = expert_mlp_reference(SPEC, held, hidden_TH, OFFSETS_S1, TOKEN_ROWS_R, weights_R)
    assert relative_error(out_TH, expected_TH.float()) < 1e-6


def test_a_checkpoints_fp8_blocks_are_widened_first() -> None:
    spec = ExpertSpec(hidden_size=256, intermediate_size=128)
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(256, 256, generator=generator), torch.randn(256, 128, generator=generator)
    held_up, held_down = Fp8Block().quantise(up), Fp8Block().quantise(down)
    fp8 = ExpertWeights(
        up_2IH=held_up.codes, down_HI=held_down.codes, up_scale=held_up.scale, down_scale=held_down.scale
    )
    wide = ExpertWeights(up_2IH=Fp8Block().dequantise(held_up, 256), down_HI=Fp8Block().dequantise(held_down, 128))
    outs = []
    for weights in (fp8, wide):
        emulated = EmulatedBackend(spec, Unquantised(torch.float32), dtype=torch.float32)
        emulated.load(7, weights)
        rows = torch.zeros(1, dtype=torch.int32)
        offsets = torch.tensor([0, 1], dtype=torch.int32)
        outs.append(emulated.forward(torch.ones(1, 256), torch.tensor([7]), offsets, rows, torch.ones(1)))
    assert torch.equal(*outs)
