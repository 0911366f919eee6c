"""Matrices in int8 with one scale per output; rows are quantised as they come, each with a scale of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """weight: int8 [O, I] in oneDNN's layout; scale_O: float32, value of one step; zero_O: zeros, as oneDNN wants."""

    weight: torch.Tensor
    scale_O: torch.Tensor
    zero_O: torch.Tensor
    bias_O: torch.Tensor | None
    nbytes: int


class Int8Format:
    """A CpuFormat of a quarter of float32's bytes, multiplied in integers by oneDNN.

    Rounding moves a weight by at most 1/254 of its output's largest, and a value of a row by at most 1/254 of the
    row's largest (1/126 on a CPU without VNNI, where sums of two full 8-bit products saturate). For normally
    distributed weights and rows that is a relative error of 2 to 4 % of an expert's output.
    """

    def __init__(self) -> None:
        self._levels = row_levels()

    @staticmethod
    def is_supported() -> bool:
        """Whether this torch has oneDNN."""
        return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]

    def pack(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Int8Matrix:
        """See CpuFormat.pack."""
        weight = weight_OI.float()
        scale_O = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        quantised = (weight / scale_O[:, None]).round().to(torch.int8)
        return Int8Matrix(
            weight=torch.ops.onednn.qlinear_prepack(quantised, None),
            scale_O=scale_O,
            zero_O=torch.zeros(len(scale_O), dtype=torch.int64),
            bias_O=None if bias_O is None else bias_O.float(),
            nbytes=quantised.nbytes,
        )

    def multiply(self, matrices: Sequence[Int8Matrix], rows_RI: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """See CpuFormat.multiply."""
        levels = self._levels
        step_R1 = rows_RI.abs().amax(dim=1, keepdim=True).mul_(1 / levels).clamp_min_(1e-30)
        # Steps above zero, plus zero's own place, plus a half: the cast then rounds to nearest.
        quantised = (rows_RI / step_R1).add_(levels + 1.5).to(torch.uint8)
        parts = torch.split_with_sizes(quantised, list(counts))
        outs = [_multiply(part, levels + 1, matrix) for matrix, part in zip(matrices, parts, strict=True)]
        out_RO = outs[0] if len(outs) == 1 else torch.cat(outs)
        out_RO.mul_(step_R1)
        for matrix, part in zip(matrices, torch.split_with_sizes(out_RO, list(counts)), strict=True):
            if matrix.bias_O is not None:
                part.add_(matrix.bias_O)
        return out_RO


def _multiply(rows: torch.Tensor, zero: int, matrix: Int8Matrix) -> torch.Tensor:
    out_RO: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        rows, 1.0, zero, matrix.weight, matrix.scale_O, matrix.zero_O, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out_RO


@cache
def row_levels() -> int:
    """Steps on either side of zero for rows: 127, or 63 where this CPU adds pairs of products in 16 bits."""
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    matrix = Int8Matrix(packed, torch.ones(32), torch.zeros(32, dtype=torch.int64), None, weight.nbytes)
    rows = torch.full((4, 64), 255, dtype=torch.uint8)
    return 127 if _multiply(rows, 128, matrix).eq(127 * 127 * 64).all() else 63
