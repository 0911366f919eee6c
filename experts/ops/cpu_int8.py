"""A matrix in int8 with one scale per output; rows are quantised as they come, each with a scale of its own."""

from __future__ import annotations

from functools import cache

import torch


class Int8Linear:
    """A CpuLinear of a quarter of the bytes, multiplied in integers by oneDNN.

    Errors: weights 1/254 of the largest of their output, rows 1/254 of their largest value (1/126 on a CPU without
    VNNI, where products of full 8 bits saturate).
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        weight = weight_OI.float()
        scale_O = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        quantised = (weight / scale_O[:, None]).round().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._scale_O = scale_O
        self._zero_O = torch.zeros(len(scale_O), dtype=torch.int64)
        self._bias = None if bias_O is None else bias_O.float()
        self._levels = row_levels()
        self.nbytes = quantised.nbytes

    def __call__(self, rows_RI: torch.Tensor) -> torch.Tensor:
        """See CpuLinear."""
        levels = self._levels
        step_R1 = rows_RI.abs().amax(dim=1, keepdim=True).clamp_min_(1e-30).div_(levels)
        quantised = (rows_RI / step_R1).round_().add_(levels + 1).to(torch.uint8)
        out_RO: torch.Tensor = _multiply(quantised, levels + 1, self._weight, self._scale_O, self._zero_O)
        out_RO.mul_(step_R1)
        return out_RO if self._bias is None else out_RO.add_(self._bias)


def _multiply(
    rows: torch.Tensor, zero: int, weight: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor
) -> torch.Tensor:
    out_RO: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        rows, 1.0, zero, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out_RO


@cache
def row_levels() -> int:
    """Steps on either side of zero for rows: 127, or 63 where this CPU adds pairs of products in 16 bits."""
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    rows = torch.full((4, 64), 255, dtype=torch.uint8)
    out = _multiply(rows, 128, packed, torch.ones(32), torch.zeros(32, dtype=torch.int64))
    return 127 if out.eq(127 * 127 * 64).all() else 63
