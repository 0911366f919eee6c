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
    # numpy's calls are several times shorter than torch's, and a single token's sort is nothing but calls.
    ids_R = expert_ids_TK.numpy().reshape(-1)
    order_R = np.argsort(ids_R, kind="stable")
    ids_R = ids_R[order_R]
    skipped = int(np.searchsorted(ids_R, 0))
    ids_R, order_R = ids_R[skipped:], order_R[skipped:]
    is_first_R = np.ones(len(ids_R), dtype=bool)
    np.not_equal(ids_R[1:], ids_R[:-1], out=is_first_R[1:])
    starts_S = np.flatnonzero(is_first_R)
    return SortedRows(
        expert_ids_S=torch.from_numpy(ids_R[starts_S].astype(np.int32)),
        offsets_S1=torch.from_numpy(np.append(starts_S, len(ids_R)).astype(np.int32)),
        token_rows_R=torch.from_numpy((order_R // expert_ids_TK.shape[1]).astype(np.int32)),
        weights_R=torch.from_numpy(weights_TK.numpy().reshape(-1)[order_R].astype(np.float32, copy=False)),
    )
