"""Routed rows in expert order."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class SortedRows(NamedTuple):
    """Routed rows sorted by expert, ties by token: an ExpertCall's index tensors.

    expert_ids_S: int32, ascending, experts with at least one row
    offsets_S1:   int32, rows of expert s are `offsets[s]:offsets[s+1]`
    token_rows_R: int32, the token of each row
    weights_R:    float32
    """

    expert_ids_S: torch.Tensor
    offsets_S1: torch.Tensor
    token_rows_R: torch.Tensor
    weights_R: torch.Tensor


def sort_by_expert(expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> SortedRows:
    """Sort the (token, expert) pairs of a gate's output by expert; pairs with expert -1 are left out. On CPU."""
    # numpy's methods are several times shorter than torch's, and a single token's sort is nothing but calls.
    ids_R = expert_ids_TK.numpy().reshape(-1)
    order_R = ids_R.argsort(kind="stable")
    ids_R = ids_R[order_R]
    if len(ids_R) and ids_R[0] < 0:
        skipped = ids_R.searchsorted(0)
        ids_R, order_R = ids_R[skipped:], order_R[skipped:]
    is_first_R = np.empty(len(ids_R), bool)
    is_first_R[:1] = True
    np.not_equal(ids_R[1:], ids_R[:-1], out=is_first_R[1:])
    (starts_S,) = is_first_R.nonzero()
    offsets_S1 = np.empty(len(starts_S) + 1, np.int32)
    offsets_S1[:-1], offsets_S1[-1] = starts_S, len(ids_R)
    token_rows_R = np.floor_divide(order_R, expert_ids_TK.shape[1], dtype=np.int32, casting="unsafe")
    weights_R = weights_TK.numpy().reshape(-1)[order_R]
    return SortedRows(
        expert_ids_S=torch.from_numpy(ids_R[starts_S]).int(),
        offsets_S1=torch.from_numpy(offsets_S1),
        token_rows_R=torch.from_numpy(token_rows_R),
        weights_R=torch.from_numpy(weights_R).float(),
    )
