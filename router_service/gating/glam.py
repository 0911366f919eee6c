"""GLaM: top-2 of a softmax, the two outputs averaged by their renormalised scores; nothing is dropped when serving.

Source: Du et al. 2021, "GLaM: Efficient Scaling of Language Models with Mixture-of-Experts" (arXiv 2112.06905),
section 4, after GShard's gating.
"""

from __future__ import annotations

import torch

from router_service.gating.choice import choose, normalised
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class GlamGate:
    """weight_EH: the gate's linear layer. The paper's K is 2; the spec's is used."""

    def __init__(self, spec: GateSpec, weight_EH: torch.Tensor) -> None:
        self._top_k = spec.num_experts_per_tok
        self._logits = GateLogits(weight_EH)

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        scores_TE = self._logits(hidden_TH).softmax(dim=-1)
        chosen = choose(scores_TE, scores_TE, self._top_k, limit)
        return chosen._replace(weights_TK=normalised(chosen.weights_TK))
