"""Routed rows in expert order."""

from __future__ import annotations

from typing import NamedTuple

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
    """Sort the (token, expert) pairs of a gate's output by expert; pairs with expert -1 are left out."""
    experts_per_token = expert_ids_TK.shape[1]
    ids_R = expert_ids_TK.reshape(-1)
    ids_R, order_R = torch.sort(ids_R, stable=True)
    weights_R = weights_TK.reshape(-1).float()
    skipped = int((ids_R < 0).sum())
    ids_R, order_R = ids_R[skipped:], order_R[skipped:]
    expert_ids_S, counts_S = torch.unique_consecutive(ids_R, return_counts=True)
    offsets_S1 = torch.zeros(len(counts_S) + 1, dtype=torch.int32, device=ids_R.device)
    offsets_S1[1:] = counts_S.cumsum(0)
    return SortedRows(
        expert_ids_S=expert_ids_S.int(),
        offsets_S1=offsets_S1,
        token_rows_R=(order_R // experts_per_token).int(),
        weights_R=weights_R[order_R],
    )
