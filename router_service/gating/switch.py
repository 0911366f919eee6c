"""Switch Transformer: the one best expert, weighted by its softmax score.

Source: Fedus et al. 2021, "Switch Transformers" (arXiv 2101.03961), equations 1 and 2; transformers'
SwitchTransformersTop1Router. Capacity (equation 3): wrap in `CapacityGate`, overflow "drop".
"""

from __future__ import annotations

import torch

from router_service.gating.choice import choose
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class SwitchGate:
    """weight_EH: the gate's linear layer."""

    def __init__(self, spec: GateSpec, weight_EH: torch.Tensor) -> None:
        self._logits = GateLogits(weight_EH)

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        scores_TE = self._logits(hidden_TH).softmax(dim=-1)
        return choose(scores_TE, scores_TE, 1, limit)
