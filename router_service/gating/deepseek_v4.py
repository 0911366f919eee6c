"""DeepSeek-V4: square root of softplus as score, a bias that steers the choice and not the weight, no groups.

Source: transformers' DeepseekV4TopKRouter (`scoring_func` "sqrtsoftplus"). The first layers of that model choose by a
table of token ids (`hash_moe`) and not by a gate: its MoE goes through `Router.dispatch`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from router_service.gating.choice import choose
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class DeepseekV4Gate:
    """weight_EH: the gate's linear layer; bias_E: `e_score_correction_bias`."""

    def __init__(self, spec: GateSpec, weight_EH: torch.Tensor, bias_E: torch.Tensor) -> None:
        self._spec = spec
        self._logits = GateLogits(weight_EH)
        self._bias_E = bias_E.float()

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        scores_TE = F.softplus(self._logits(hidden_TH)).sqrt()
        chosen = choose(scores_TE + self._bias_E, scores_TE, self._spec.num_experts_per_tok, limit)
        weights_TK = chosen.weights_TK / (chosen.weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen._replace(weights_TK=weights_TK * self._spec.routed_scaling_factor)
