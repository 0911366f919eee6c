"""Qwen3-MoE: top K of a softmax over all experts, renormalised where `norm_topk_prob` says so.

Source: Qwen Team 2025, "Qwen3 Technical Report" (arXiv 2505.09388), section 2; transformers' Qwen3MoeTopKRouter.
"""

from __future__ import annotations

from typing import Literal

import torch

from router_service.gating.choice import choose, normalised
from router_service.gating.compiled_gate import GateFormula
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class Qwen3MoeGate:
    """weight_EH: the gate's linear layer."""

    def __init__(self, spec: GateSpec, weight_EH: torch.Tensor) -> None:
        self._top_k = spec.num_experts_per_tok
        self._norm_topk_prob = spec.norm_topk_prob
        self._logits = GateLogits(weight_EH)

    @property
    def formula(self) -> GateFormula | None:
        """The same as compiled code knows it; None on a GPU."""
        if self._logits.packed is None:
            return None
        weight: Literal["normalised", "score"] = "normalised" if self._norm_topk_prob else "score"
        return GateFormula(logits=self._logits.packed, top_k=self._top_k, score="softmax", weight=weight)

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        scores_TE = self._logits(hidden_TH).softmax(dim=-1)
        chosen = choose(scores_TE, scores_TE, self._top_k, limit)
        return chosen._replace(weights_TK=normalised(chosen.weights_TK)) if self._norm_topk_prob else chosen
