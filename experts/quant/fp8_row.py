"""fp8 (e4m3) with a scale for every output row: the fastest on cards that have fp8."""

from __future__ import annotations

import torch

from experts.quant.scheme import QuantisedWeight, pad_columns, safe_scale, stored_columns

LARGEST = 448.0


class Fp8Row:
    """scale: float32 [N]."""

    name = "fp8"
    codes_dtype = torch.float8_e4m3fn

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """See Scheme.codes_shape."""
        return rows, stored_columns(columns)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """See Scheme.scale_shape."""
        return (rows,)

    def quantise(self, weight_NK: torch.Tensor) -> QuantisedWeight:
        """See Scheme.quantise."""
        weight_NK = weight_NK.float()
        scale = safe_scale(weight_NK.abs().amax(1) / LARGEST)
        return QuantisedWeight(pad_columns((weight_NK / scale[:, None]).to(torch.float8_e4m3fn)), scale)

    def dequantise(self, weight: QuantisedWeight, columns: int) -> torch.Tensor:
        """See Scheme.dequantise."""
        assert weight.scale is not None
        return weight.codes[:, :columns].float() * weight.scale[:, None]
