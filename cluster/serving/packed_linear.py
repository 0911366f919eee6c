"""Linear layers packed for the CPU.

A float32 `F.linear` runs far below the machine's rate at the 2 to 64 rows of a decode step; oneDNN with weights laid
out beforehand runs two to three times as fast, with the same float32 arithmetic.
"""

from __future__ import annotations

import torch
from torch import nn

_ROWS_HINT = 16


class PackedLinear(nn.Module):
    """`y = x W^T + b` with W in oneDNN's own layout; the plain weight is gone. Float32, CPU, inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        # `_reorder_linear_weight` is what torch.compile's freezing uses; it has no public name.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS_HINT)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._packed, self._bias, "none", [], "")
        return out


def pack_linears(model: nn.Module, *, keep: frozenset[nn.Module]) -> None:
    """Replace every float32 CPU `nn.Linear` of `model` except those in `keep`, one at a time."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or child in keep:  # a subclass has a forward of its own
                continue
            if child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child))
