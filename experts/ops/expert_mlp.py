"""What every backend computes, written plainly: the slow reference that the others are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from experts.ops.activations import activate
from experts.ops.unpermute import unpermute_reference
from experts.spec import ExpertSpec, ExpertWeights


def expert_mlp_reference(
    spec: ExpertSpec,
    weights_S: Sequence[ExpertWeights],
    hidden_TH: torch.Tensor,
    offsets_S1: torch.Tensor,
    token_rows_R: torch.Tensor,
    weights_R: torch.Tensor,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`partial_TH` of an ExpertBackend's `forward`, computed in `dtype`; weights must not be quantised."""
    rows_RH = hidden_TH.to(dtype)[token_rows_R.long()]
    out_RH = torch.empty_like(rows_RH)
    for weights, start, end in zip(weights_S, offsets_S1.tolist(), offsets_S1.tolist()[1:], strict=False):
        up_bias = None if weights.up_bias_2I is None else weights.up_bias_2I.to(dtype)
        down_bias = None if weights.down_bias_H is None else weights.down_bias_H.to(dtype)
        up = F.linear(rows_RH[start:end], weights.up_2IH.to(dtype), up_bias)
        out_RH[start:end] = F.linear(activate(up, spec), weights.down_HI.to(dtype), down_bias)
    return unpermute_reference(out_RH, token_rows_R, weights_R, len(hidden_TH))
