"""Experts' rows back to their tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch


def unpermute(
    out_RH: torch.Tensor, token_rows_R: torch.Tensor, weights_R: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """Weighted sum of each token's rows, float32 [T, H], added in ascending row order; 0 without rows.

    out_RH: float32 on CPU, a row's values beside each other
    """
    partial_TH = torch.zeros(num_tokens, out_RH.shape[1])
    # Rows may be further apart than they are long.
    padded_RP = out_RH.as_strided((len(out_RH), out_RH.stride(0)), out_RH.stride())
    compiled_unpermute()(padded_RP.numpy(), token_rows_R.numpy(), weights_R.float().numpy(), partial_TH.numpy())
    return partial_TH


def unpermute_reference(
    out_RH: torch.Tensor, token_rows_R: torch.Tensor, weights_R: torch.Tensor, num_tokens: int
) -> torch.Tensor:
    """`unpermute` as its definition, on any device and in `out_RH`'s dtype."""
    partial_TH = out_RH.new_zeros(num_tokens, out_RH.shape[1])
    return partial_TH.index_add_(0, token_rows_R.long(), out_RH * weights_R[:, None].to(out_RH.dtype))


@cache
def compiled_unpermute() -> Callable[..., None]:
    """What `unpermute` runs; the first call compiles it, a tenth of a second."""
    # Loads LLVM, which a process without experts on CPU does not need.
    from experts.ops._numba.unpermute import compile_unpermute

    return compile_unpermute()
