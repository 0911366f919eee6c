"""Activations by the names that checkpoints' config.json uses (`hidden_act`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional as F

from experts.spec import ExpertSpec


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
}


def activate(up_R2I: torch.Tensor, spec: ExpertSpec) -> torch.Tensor:
    """What lies between an expert's two projections: [R, 2I] (gate, then up) to [R, I], or [R, I] to [R, I].

    Gated: `act(gate) * (up + up_shift)`, with gate clamped above and up on both sides at `limit` where there
    is one (openai/gpt-oss, gpt_oss/torch/model.py `swiglu`). Plain: `act(up)`. May overwrite its argument.
    """
    act = ACTIVATIONS[spec.activation]
    if not spec.gated:
        return act(up_R2I)
    gate_RI, up_RI = up_R2I.chunk(2, dim=-1)
    if spec.limit is not None:
        gate_RI = gate_RI.clamp(max=spec.limit)
        up_RI = up_RI.clamp(-spec.limit, spec.limit)
    if spec.up_shift:
        up_RI = up_RI + spec.up_shift
    return act(gate_RI).mul_(up_RI)
