"""What every gate is: float32 scores of a linear layer, a choice of experts, their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch

System = Literal[
    "shazeer",
    "gshard",
    "switch",
    "glam",
    "mixtral",
    "grok_1",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
]

ChoiceLimit = Callable[[torch.Tensor, int], torch.Tensor]
"""(choice_TE, K) -> choice_TE (float32, what the gate takes the top K of) with -inf at experts that a token may not
use; it has -inf already where the gate itself allows none."""


class GateOutput(NamedTuple):
    """expert_ids_TK: int64, -1 where a token uses fewer than K experts; weights_TK: float32, 0 there."""

    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor


class Gate(Protocol):
    """`hidden_TH` in any float dtype -> GateOutput on the same device. Computes in float32.

    limit: sees and may narrow what the choice is made from, after the gate's own limits; weights stay those of the
           scores. Ties go to whichever expert `torch.topk` returns, or to the lower number (`compiled_gate`). A token
           with NaN scores still gets K distinct experts; its weights are NaN, so the damage shows in its own output
           row and in no other.
    """

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class GateSpec:
    """One model's gate; field names are those of Hugging Face's config.json.

    n_group, topk_group: experts are n_group contiguous groups, a token picks from the best topk_group of
                         them; None where the gate has no groups
    """

    system: System
    num_experts: int
    num_experts_per_tok: int
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    n_group: int | None = None
    topk_group: int | None = None
