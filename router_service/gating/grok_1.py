"""Grok-1: softmax over all experts, then the top 2, not renormalised.

Source: github.com/xai-org/grok-1, model.py, class Router.
"""

from __future__ import annotations

import torch

from router_service.gating.choice import choose
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class Grok1Gate:
    """weight_EH: the gate's linear layer."""

    def __init__(self, spec: GateSpec, weight_EH: torch.Tensor) -> None:
        self._top_k = spec.num_experts_per_tok
        self._logits = GateLogits(weight_EH)

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        scores_TE = self._logits(hidden_TH).softmax(dim=-1)
        return choose(scores_TE, scores_TE, self._top_k, limit)
