"""Routed rows in expert order, on a card and without asking it anything."""

from __future__ import annotations

import torch

from experts.ops._triton.sort import counting_sort
from experts.ops.sort import SortedRows


def group_rows(expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> SortedRows:
    """`sort_by_expert` for a card: sizes depend on shapes alone, so nothing waits and a CUDA graph can hold it.

    expert_ids_TK: integers in [0, num_experts); weights_TK: any float dtype. `expert_ids_S` lists every expert, those
    without rows too; or, when there are four times as many experts as rows, it names each row's expert in the order
    that the rows came in: most would be alone with their expert, so sorting gains nothing.
    """
    num_tokens, experts_per_token = expert_ids_TK.shape
    num_rows = num_tokens * experts_per_token
    device = expert_ids_TK.device
    ids_R, weights_R = expert_ids_TK.reshape(-1), weights_TK.reshape(-1).float()
    if num_rows * 4 <= num_experts:
        order_R = torch.arange(num_rows, dtype=torch.int32, device=device)
        offsets_S1 = torch.arange(num_rows + 1, dtype=torch.int32, device=device)
        return SortedRows(ids_R.int(), offsets_S1, order_R // experts_per_token, weights_R)
    order_R, offsets_S1 = counting_sort(ids_R.contiguous(), num_experts)
    expert_ids_S = torch.arange(num_experts, dtype=torch.int32, device=device)
    return SortedRows(expert_ids_S, offsets_S1, order_R // experts_per_token, weights_R[order_R])
