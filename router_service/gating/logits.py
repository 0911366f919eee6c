"""The linear layer that every gate starts with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gate_logits(hidden_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """Float32 logits_TE; `weight_EH` is float32 already."""
    return F.linear(hidden_TH.float(), weight_EH)
