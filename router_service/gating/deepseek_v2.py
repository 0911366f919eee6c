"""DeepSeekMoE and DeepSeek-V2: softmax scores, greedy or limited to the best groups of experts.

Source: Dai et al. 2024, "DeepSeekMoE" (arXiv 2401.06066), equations 9 to 11; DeepSeek-AI 2024, "DeepSeek-V2"
(arXiv 2405.04434), section 2.2.2, where a group is what one device holds and its score is its best expert's.
`topk_method` greedy is a spec without n_group. Like transformers' DeepseekV2TopkRouter, never renormalises.
"""

from __future__ import annotations

import torch

from router_service.gating.choice import choose
from router_service.gating.compiled_gate import GateFormula
from router_service.gating.expert_groups import keep_best_groups
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class DeepseekV2Gate:
    """weight_EH: the gate's linear layer."""

    def __init__(self, spec: GateSpec, weight_EH: torch.Tensor) -> None:
        self._spec = spec
        self._logits = GateLogits(weight_EH)

    @property
    def formula(self) -> GateFormula | None:
        """The same as compiled code knows it; None on a GPU."""
        spec = self._spec
        if self._logits.packed is None:
            return None
        limited = spec.n_group is not None and spec.topk_group is not None
        return GateFormula(
            logits=self._logits.packed,
            top_k=spec.num_experts_per_tok,
            score="softmax",
            weight="score",
            scale=spec.routed_scaling_factor,
            group_score="best" if limited else None,
            n_group=spec.n_group or 1,
            topk_group=spec.topk_group or 1,
            closed=0.0,
        )

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        spec = self._spec
        scores_TE = self._logits(hidden_TH).softmax(dim=-1)
        choice_TE = scores_TE
        if spec.n_group is not None and spec.topk_group is not None:
            group_scores_TG = scores_TE.view(-1, spec.n_group, spec.num_experts // spec.n_group).amax(dim=-1)
            choice_TE = keep_best_groups(scores_TE, group_scores_TG, spec.topk_group)
        chosen = choose(choice_TE, scores_TE, spec.num_experts_per_tok, limit)
        return chosen._replace(weights_TK=chosen.weights_TK * spec.routed_scaling_factor)
