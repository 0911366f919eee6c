"""Mixtral 8x7B and 8x22B: softmax over the chosen K logits.

Source: Jiang et al. 2024, "Mixtral of Experts" (arXiv 2401.04088), section 2.1: softmax(TopK(x W_g)). Renormalising the
top K of a softmax over all experts, as transformers' MixtralTopKRouter does, is the same function in more operations.
"""

from __future__ import annotations

import torch

from router_service.gating.choice import choose
from router_service.gating.compiled_gate import GateFormula
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class MixtralGate:
    """weight_EH: the gate's linear layer."""

    def __init__(self, spec: GateSpec, weight_EH: torch.Tensor) -> None:
        self._top_k = spec.num_experts_per_tok
        self._logits = GateLogits(weight_EH)

    @property
    def formula(self) -> GateFormula | None:
        """The same as compiled code knows it; None on a GPU."""
        if self._logits.packed is None:
            return None
        return GateFormula(logits=self._logits.packed, top_k=self._top_k, score="logits", weight="softmax")

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        logits_TE = self._logits(hidden_TH)
        chosen = choose(logits_TE, logits_TE, self._top_k, limit)
        return chosen._replace(weights_TK=chosen.weights_TK.softmax(dim=-1))
