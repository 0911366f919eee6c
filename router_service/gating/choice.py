"""The top K of what a gate chooses from."""

from __future__ import annotations

import torch

from router_service.gating.gate import ChoiceLimit, GateOutput


def choose(choice_TE: torch.Tensor, scores_TE: torch.Tensor, top_k: int, limit: ChoiceLimit | None) -> GateOutput:
    """The experts with the K largest values of `choice_TE`, weighted by their `scores_TE`."""
    if limit is not None:
        choice_TE = limit(choice_TE, top_k)
    expert_ids_TK = choice_TE.topk(top_k, dim=-1).indices
    return GateOutput(expert_ids_TK, scores_TE.gather(1, expert_ids_TK))


def normalised(weights_TK: torch.Tensor) -> torch.Tensor:
    """Weights of a token divided by their sum."""
    return weights_TK / weights_TK.sum(dim=-1, keepdim=True)
