"""int8 weights with a scale for every output row; activations stay in the model's dtype."""

from __future__ import annotations

import torch

from experts.quant.scheme import QuantisedWeight, pad_columns, safe_scale, stored_columns


class Int8:
    """codes: uint8, the signed code plus 128 (kernels widen unsigned bytes faster); scale: float32 [N]."""

    name = "int8"
    codes_dtype = torch.uint8

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """See Scheme.codes_shape."""
        return rows, stored_columns(columns)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """See Scheme.scale_shape."""
        return (rows,)

    def quantise(self, weight_NK: torch.Tensor) -> QuantisedWeight:
        """See Scheme.quantise."""
        weight_NK = weight_NK.float()
        scale = safe_scale(weight_NK.abs().amax(1) / 127)
        codes = (weight_NK / scale[:, None]).round().clamp(-127, 127).nan_to_num() + 128
        return QuantisedWeight(pad_columns(codes.to(torch.uint8)), scale)

    def dequantise(self, weight: QuantisedWeight, columns: int) -> torch.Tensor:
        """See Scheme.dequantise."""
        assert weight.scale is not None
        return (weight.codes[:, :columns].float() - 128) * weight.scale[:, None]
