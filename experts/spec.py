"""What an expert looks like, what a call to a group of them holds. Plain frozen data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class ExpertKey(NamedTuple):
    """An expert: the model's layer index and the expert's index in that layer."""

    layer: int
    expert: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSpec:
    """Shape and arithmetic that all experts of a model share.

    gated:      `down(act(gate(x)) * up(x))`, else `down(act(up(x)))`
    bias:       both projections have a bias
    activation: name of an entry in `experts.ops.activations.ACTIVATIONS`
    limit:      clamp of gate (above) and up (both sides), GPT-OSS; None for everyone else
    up_shift:   added to up before the product, `act(gate) * (up + up_shift)`: 1 for GPT-OSS, else 0
    """

    hidden_size: int
    intermediate_size: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    limit: float | None = None
    up_shift: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertWeights:
    """One expert's weights in the checkpoint's orientation, gate rows first, then up rows, not interleaved.

    up_2IH:   [2I, H] gated (gate over up), [I, H] plain
    down_HI:  [H, I]
    scales:   float32 block scales [ceil(rows/128), ceil(cols/128)] where the weight is fp8, else None
    """

    up_2IH: torch.Tensor
    down_HI: torch.Tensor
    up_bias_2I: torch.Tensor | None = None
    down_bias_H: torch.Tensor | None = None
    up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertCall:
    """What one engine asks of one group for one layer: rows sorted by expert, each token sent once.

    hidden_TH:     the distinct tokens that have an expert in this group, model or wire dtype
    expert_ids_S:  int32, ascending, distinct experts asked for
    offsets_S1:    int32, rows of expert s are `offsets[s]:offsets[s+1]`
    token_rows_R:  int32, row of hidden_TH that each routed row reads
    weights_R:     float32 router weight of each routed row
    The answer is `partial_TH`: float32, the weighted sum of the group's experts for each token, summed in
    ascending expert order.
    """

    layer: int
    hidden_TH: torch.Tensor
    expert_ids_S: torch.Tensor
    offsets_S1: torch.Tensor
    token_rows_R: torch.Tensor
    weights_R: torch.Tensor


class Forwards(Protocol):
    """A group, as whoever carries calls to it sees it."""

    def forward(self, call: ExpertCall) -> torch.Tensor: ...
