"""A gate on the CPU, as one compiled call in place of a dozen operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from experts.ops.packed_matmul import PackedMatrix
from router_service.gating.gate import ChoiceLimit, Gate, GateOutput

# More are done with sooner by operators, where these have more than so many threads (for up to 8 experts a token).
_MOST_TOKENS, _MOST_THREADS = 64, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class GateFormula:
    """What a gate makes of its logits, K experts a token.

    score:   what becomes of logits;  bias_E: what is added to scores for the choice, None: nothing
    weight:  the chosen experts' scores as they are, `normalised` (divided by their sum + `epsilon`), or their
             `softmax`; times `scale`
    group_score: best, or sum of the best_two choices of each of `n_group` groups of experts, of which a token uses
             `topk_group`; the other experts' choice (and score, where it is 0) is `closed`. None: no groups
    """

    logits: PackedMatrix
    top_k: int
    score: Literal["logits", "softmax", "sigmoid"]
    weight: Literal["score", "normalised", "softmax"]
    bias_E: torch.Tensor | None = None
    scale: float = 1.0
    epsilon: float = 0.0
    group_score: Literal["best", "best_two"] | None = None
    n_group: int = 1
    topk_group: int = 1
    closed: float = float("-inf")

    @property
    def kind(self) -> tuple[tuple[str, bool], str, str, str | None, float]:
        """What compiled code has to know."""
        return self.logits.kind, self.score, self.weight, self.group_score, self.closed


class CompiledGate:
    """`gate`, which still computes large batches where torch has many threads, and all that is limited, not float32
    or not on a CPU.

    constants: what compiled code wants to know after the hidden states, see `compile_choose_experts`
    """

    def __init__(self, gate: Gate, formula: GateFormula) -> None:
        # Loads LLVM, which a GPU's process does not need.
        from router_service._numba.choose_experts import compile_choose_experts

        self.gate = gate
        self.formula = formula
        num_experts, bias_E = formula.logits.num_outputs, formula.bias_E
        # Compiled code looks at no bounds.
        assert formula.top_k <= num_experts
        assert num_experts % formula.n_group == 0
        assert formula.topk_group <= formula.n_group
        assert formula.group_score != "best_two" or num_experts >= 2 * formula.n_group
        bias = np.zeros(num_experts, np.float32) if bias_E is None else bias_E.detach().float().contiguous().numpy()
        self.constants = (
            *(*(np.array([address]) for address in formula.logits.addresses()), len(formula.logits.panels), bias),
            *(formula.n_group, formula.topk_group, formula.scale, formula.epsilon),
        )
        self._width = formula.logits.panels.shape[1]
        self._run = compile_choose_experts(*formula.kind)

    def takes(self, hidden_TH: torch.Tensor) -> bool:
        """Whether compiled code can compute a batch."""
        return hidden_TH.shape[1] == self._width and hidden_TH.dtype is torch.float32 and hidden_TH.device.type == "cpu"

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        num_tokens = len(hidden_TH)
        few = num_tokens <= _MOST_TOKENS or torch.get_num_threads() <= _MOST_THREADS
        if limit is not None or not few or not self.takes(hidden_TH):
            return self.gate(hidden_TH, limit)
        expert_ids_TK = torch.empty(num_tokens, self.formula.top_k, dtype=torch.int64)
        weights_TK = torch.empty(num_tokens, self.formula.top_k)
        self._run(
            *(hidden_TH.detach().contiguous().numpy(), *self.constants),
            *(np.empty((num_tokens, self.formula.logits.num_columns), np.float32),),
            *(expert_ids_TK.numpy(), weights_TK.numpy()),
        )
        return GateOutput(expert_ids_TK, weights_TK)
