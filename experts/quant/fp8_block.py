"""fp8 (e4m3) with a scale for 128 x 128 weights: what DeepSeek-V3 and Kimi K2 checkpoints hold."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from experts.quant.scheme import GROUP, QuantisedWeight, pad_columns, safe_scale, stored_columns

LARGEST = 448.0


class Fp8Block:
    """scale: float32 [ceil(N/128), ceil(K/128)], the checkpoint's `weight_scale_inv` (arXiv 2412.19437, 3.3.2)."""

    name = "fp8_block"
    codes_dtype = torch.float8_e4m3fn

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """See Scheme.codes_shape."""
        return rows, stored_columns(columns)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """See Scheme.scale_shape."""
        return -(-rows // GROUP), -(-columns // GROUP)

    def quantise(self, weight_NK: torch.Tensor) -> QuantisedWeight:
        """See Scheme.quantise."""
        rows = weight_NK.shape[0]
        padded = F.pad(pad_columns(weight_NK.float()), (0, 0, 0, -rows % GROUP))
        blocks = padded.view(padded.shape[0] // GROUP, GROUP, padded.shape[1] // GROUP, GROUP)
        scale = safe_scale(blocks.abs().amax((1, 3)) / LARGEST)
        codes = (blocks / scale[:, None, :, None]).view(padded.shape)[:rows]
        return QuantisedWeight(codes.to(torch.float8_e4m3fn), scale)

    def dequantise(self, weight: QuantisedWeight, columns: int) -> torch.Tensor:
        """See Scheme.dequantise."""
        assert weight.scale is not None
        rows = weight.codes.shape[0]
        scale = weight.scale.repeat_interleave(GROUP, 0)[:rows].repeat_interleave(GROUP, 1)
        return (weight.codes.float() * scale[:, : weight.codes.shape[1]])[:, :columns]
