"""A call to all groups of one node at once: every token crosses to the node once, one partial sum comes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experts.spec import ExpertCall


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeShare:
    """What one of the node's groups does.

    address:  host:port of the group's ExpertService; empty for the group that receives the call
    tokens_T: int32 [T'], ascending, rows of the call's hidden_TH that the group needs; None: all of them
    expert_ids_S, offsets_S1, token_rows_R (into tokens_T), weights_R: as in `ExpertCall`
    """

    group: int
    address: str
    tokens_T: torch.Tensor | None
    expert_ids_S: torch.Tensor
    offsets_S1: torch.Tensor
    token_rows_R: torch.Tensor
    weights_R: torch.Tensor

    def call(self, layer: int, hidden_TH: torch.Tensor) -> ExpertCall:
        """The share as a call of its own; `hidden_TH` is the node's."""
        if self.tokens_T is not None:
            hidden_TH = hidden_TH.index_select(0, self.tokens_T.to(hidden_TH.device))
        return ExpertCall(
            layer=layer,
            hidden_TH=hidden_TH,
            expert_ids_S=self.expert_ids_S,
            offsets_S1=self.offsets_S1,
            token_rows_R=self.token_rows_R,
            weights_R=self.weights_R,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeCall:
    """Shares ascending by group; the answer is their float32 sum over hidden_TH's rows, added in that order."""

    layer: int
    hidden_TH: torch.Tensor
    shares: tuple[NodeShare, ...]
