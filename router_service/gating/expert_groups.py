"""Group-limited choice: only experts of a token's best gate groups stay eligible."""

from __future__ import annotations

import math

import torch


def keep_best_groups(choice_TE: torch.Tensor, group_scores_TG: torch.Tensor, topk_group: int) -> torch.Tensor:
    """`choice_TE` with -inf at every expert outside each token's `topk_group` best groups.

    group_scores_TG: one score for each of G contiguous groups of E / G experts
    """
    num_groups = group_scores_TG.shape[1]
    best_TK = torch.topk(group_scores_TG, k=topk_group, dim=-1, sorted=False).indices
    closed_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, best_TK, False)
    grouped = choice_TE.view(-1, num_groups, choice_TE.shape[1] // num_groups)
    return grouped.masked_fill(closed_TG.unsqueeze(-1), -math.inf).view_as(choice_TE)
