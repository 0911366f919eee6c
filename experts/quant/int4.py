"""int4 weights with a scale for 128 columns of a row; activations stay in the model's dtype."""

from __future__ import annotations

import torch

from experts.quant.scheme import GROUP, QuantisedWeight, pad_columns, safe_scale, stored_columns


class Int4:
    """codes: uint8 [N, K_stored / 2]; scale: float32 [N, K_stored / 128].

    Byte j of a group holds column j in its low nibble and column j + 64 in its high one, each the signed code plus 8.
    The weight of largest magnitude in a group gets code -8 exactly (llama.cpp's Q4_0), so all 16 codes are used.
    """

    name = "int4"
    codes_dtype = torch.uint8

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """See Scheme.codes_shape."""
        return rows, stored_columns(columns) // 2

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """See Scheme.scale_shape."""
        return rows, stored_columns(columns) // GROUP

    def quantise(self, weight_NK: torch.Tensor) -> QuantisedWeight:
        """See Scheme.quantise."""
        groups = pad_columns(weight_NK.float()).view(weight_NK.shape[0], -1, GROUP)
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scale = safe_scale(extreme / -8)
        codes = ((groups / scale).round().clamp(-8, 7).nan_to_num() + 8).to(torch.uint8)
        low, high = codes.chunk(2, dim=2)
        return QuantisedWeight((low | (high << 4)).flatten(1), scale.squeeze(2))

    def dequantise(self, weight: QuantisedWeight, columns: int) -> torch.Tensor:
        """See Scheme.dequantise."""
        assert weight.scale is not None
        rows, groups = weight.scale.shape
        packed = weight.codes.view(rows, groups, GROUP // 2)
        codes = torch.cat([packed & 15, packed >> 4], dim=2).float() - 8
        return (codes * weight.scale[:, :, None]).flatten(1)[:, :columns]
