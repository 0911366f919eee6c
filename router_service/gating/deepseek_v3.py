"""DeepSeek-V3, R1 and Kimi K2 (`noaux_tc`): sigmoid scores, a bias that steers the choice and not the weight.

Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report" (arXiv 2412.19437), equations 13 to 16 and section 2.1.2; a
group's score is the sum of its two best biased experts. Kimi K2 (arXiv 2507.20534) is the same with one group.
"""

from __future__ import annotations

import torch

from router_service.gating.choice import choose
from router_service.gating.compiled_gate import GateFormula
from router_service.gating.expert_groups import keep_best_groups
from router_service.gating.gate import ChoiceLimit, GateOutput, GateSpec
from router_service.gating.logits import GateLogits


class DeepseekV3Gate:
    """weight_EH: the gate's linear layer; bias_E: `e_score_correction_bias`."""

    def __init__(self, spec: GateSpec, weight_EH: torch.Tensor, bias_E: torch.Tensor) -> None:
        self._spec = spec
        self._logits = GateLogits(weight_EH)
        self._bias_E = bias_E.float()

    @property
    def formula(self) -> GateFormula | None:
        """The same as compiled code knows it; None on a GPU."""
        spec = self._spec
        if self._logits.packed is None:
            return None
        limited = spec.n_group is not None and spec.topk_group is not None and spec.n_group > 1
        return GateFormula(
            logits=self._logits.packed,
            top_k=spec.num_experts_per_tok,
            score="sigmoid",
            weight="normalised" if spec.norm_topk_prob else "score",
            bias_E=self._bias_E,
            scale=spec.routed_scaling_factor,
            epsilon=1e-20,
            group_score="best_two" if limited else None,
            n_group=spec.n_group or 1,
            topk_group=spec.topk_group or 1,
        )

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        spec = self._spec
        scores_TE = self._logits(hidden_TH).sigmoid()
        choice_TE = scores_TE + self._bias_E
        if spec.n_group is not None and spec.topk_group is not None and spec.n_group > 1:
            grouped = choice_TE.view(-1, spec.n_group, spec.num_experts // spec.n_group)
            group_scores_TG = grouped.topk(2, dim=-1).values.sum(dim=-1)
            choice_TE = keep_best_groups(choice_TE, group_scores_TG, spec.topk_group)
        expert_ids_TK, weights_TK = choose(choice_TE, scores_TE, spec.num_experts_per_tok, limit)
        if spec.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return GateOutput(expert_ids_TK, weights_TK * spec.routed_scaling_factor)
