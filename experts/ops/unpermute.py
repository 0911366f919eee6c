"""Experts' rows back to their tokens."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def unpermute(
    out_RH: torch.Tensor, token_rows_R: torch.Tensor, weights_R: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """Weighted sum of each token's rows, float32 [T, H], added in ascending row order; 0 without rows.

    out_RH: float32 on CPU.
    """
    if not len(token_rows_R):
        return out_RH.new_zeros(num_tokens, out_RH.shape[1])
    token_rows_R, order_R = torch.sort(token_rows_R, stable=True)
    starts_T = torch.searchsorted(token_rows_R, torch.arange(num_tokens, dtype=token_rows_R.dtype))
    return F.embedding_bag(order_R, out_RH, starts_T, mode="sum", per_sample_weights=weights_R.float()[order_R])


def unpermute_reference(
    out_RH: torch.Tensor, token_rows_R: torch.Tensor, weights_R: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """`unpermute` as its definition, on any device and in `out_RH`'s dtype."""
    partial_TH = out_RH.new_zeros(num_tokens, out_RH.shape[1])
    return partial_TH.index_add_(0, token_rows_R.long(), out_RH * weights_R[:, None].to(out_RH.dtype))
