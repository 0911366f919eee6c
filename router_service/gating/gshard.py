"""GShard: top-2 of a softmax, renormalised; tokens over an expert's capacity skip it.

Source: Lepikhin et al. 2020, "GShard" (arXiv 2006.16668), algorithm 1. Its second expert is taken at random in
proportion to its weight when training; serving always takes it. Capacity: wrap in `CapacityGate`, overflow "drop",
which fills experts in the algorithm's order, all first choices before any second.
"""

from __future__ import annotations

import torch

from router_service.gating.choice import choose, normalised
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class GShardGate:
    """weight_EH: the gate's linear layer."""

    def __init__(self, spec: GateSpec, weight_EH: torch.Tensor) -> None:
        self._logits = GateLogits(weight_EH)

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        scores_TE = self._logits(hidden_TH).softmax(dim=-1)
        chosen = choose(scores_TE, scores_TE, 2, limit)
        return chosen._replace(weights_TK=normalised(chosen.weights_TK))
