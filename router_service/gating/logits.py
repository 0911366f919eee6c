"""The linear layer that every gate starts with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.errors import RequestError


def gate_logits(hidden_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Float32 logits_TE; `weight_EH` is float32 already. Raises RequestError where the widths differ."""
    if hidden_TH.shape[-1] != weight_EH.shape[1]:
        raise RequestError(f"hidden is {hidden_TH.shape[-1]} wide, the gate takes {weight_EH.shape[1]}", "hidden")
    return F.linear(hidden_TH.float(), weight_EH)
