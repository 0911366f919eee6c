"""What a quantisation scheme is: how one weight matrix becomes codes and scales, and back."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch.nn import functional as F

GROUP = 128  # columns that share a scale, and what the stored columns are a multiple of


class QuantisedWeight(NamedTuple):
    """codes: [N, K up to a multiple of 128] (int4: half as many bytes); scale: float32, or None without any."""

    codes: torch.Tensor
    scale: torch.Tensor | None


class Scheme(Protocol):
    """One way to hold a weight matrix [N, K] in fewer bits; holds nothing itself."""

    @property
    def name(self) -> str:
        """As in mesh.yaml and in error messages."""
        ...

    @property
    def codes_dtype(self) -> torch.dtype:
        """Of the stored codes."""
        ...

    def codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Of the codes of a weight [rows, columns]."""
        ...

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...] | None:
        """Of the scales of a weight [rows, columns]; its first entry is `rows` where each row has its own."""
        ...

    def quantise(self, weight_NK: torch.Tensor) -> QuantisedWeight:
        """Codes and scales on weight_NK's device. A NaN or Inf makes its whole scale's weights NaN."""
        ...

    def dequantise(self, weight: QuantisedWeight, columns: int) -> torch.Tensor:
        """float32 [N, columns]: the weights that the codes stand for."""
        ...


def stored_columns(columns: int) -> int:
    """`columns` up to a multiple of 128."""
    return -(-columns // GROUP) * GROUP


def pad_columns(weight_NK: torch.Tensor, multiple: int = GROUP) -> torch.Tensor:
    """Zeros on the right up to a multiple of `multiple` columns; contiguous."""
    missing = -weight_NK.shape[1] % multiple
    if not missing:
        return weight_NK.contiguous()
    if weight_NK.dtype == torch.float8_e4m3fn:  # F.pad has no fp8; the bits of 0.0 are 0
        return F.pad(weight_NK.view(torch.uint8), (0, missing)).view(weight_NK.dtype)
    return F.pad(weight_NK, (0, missing))


def safe_scale(scale: torch.Tensor) -> torch.Tensor:
    """1 where a scale is 0, so that all-zero weights stay zeros."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
