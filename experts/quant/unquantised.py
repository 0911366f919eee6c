"""Weights as they are, in the dtype that the card computes in."""

from __future__ import annotations

import torch

from experts.quant.scheme import QuantisedWeight, pad_columns, stored_columns


class Unquantised:
    """codes: the weights in `dtype`; no scale."""

    name = "none"

    def __init__(self, dtype: torch.dtype) -> None:
        self.codes_dtype = dtype

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """See Scheme.codes_shape."""
        return rows, stored_columns(columns)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """See Scheme.scale_shape."""
        return None

    def quantise(self, weight_NK: torch.Tensor) -> QuantisedWeight:
        """See Scheme.quantise."""
        return QuantisedWeight(pad_columns(weight_NK.to(self.codes_dtype)), None)

    def dequantise(self, weight: QuantisedWeight, columns: int) -> torch.Tensor:
        """See Scheme.dequantise."""
        return weight.codes[:, :columns].float()
