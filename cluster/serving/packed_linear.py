"""Linear layers packed for the CPU.

A float32 `F.linear` runs far below the machine's rate at the 2 to 64 rows of a decode step. Layers take the product
that experts take (`experts.ops.packed_matmul`), and half the memory where their weights are bfloat16 numbers.
"""

from __future__ import annotations

import torch
from torch import nn

from experts.ops.cpu_threads import ThreadTeam
from experts.ops.packed_matmul import PackedMatrix, pack_exactly, packed_matmul


class PackedLinear(nn.Module):
    """`y = x W^T + b` in float32, inference only; the plain weight is gone."""

    def __init__(self, linear: nn.Linear, team: ThreadTeam | None = None) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.matrix = pack_exactly(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
        self._team = team

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features)
        return packed_matmul(self.matrix, rows, self._team).view(*hidden.shape[:-1], self.out_features)


def pack_linears(model: nn.Module, team: ThreadTeam) -> None:
    """Replace every float32 CPU `nn.Linear` of `model`, one at a time."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear:  # a subclass has a forward of its own
                continue
            if child.weight.dtype == torch.float32 and child.weight.device.type == "cpu":
                setattr(module, name, PackedLinear(child, team))


def can_join(*layers: nn.Module) -> bool:
    """Whether `join_layers` can take them: packed alike, their outputs in whole panels."""
    matrices = [layer.matrix for layer in layers if isinstance(layer, PackedLinear)]
    return (
        len(matrices) == len(layers)
        and len({matrix.kind for matrix in matrices}) == 1
        and all(matrix.whole(matrix.num_outputs) for matrix in matrices)
    )


def join_layers(*layers: PackedLinear) -> PackedMatrix:
    """The layers' matrices one below the other."""
    panels = torch.cat([layer.matrix.panels for layer in layers])
    biases = [layer.matrix.bias_PL for layer in layers if layer.matrix.bias_PL is not None]
    num_outputs, bias_PL = len(panels) * panels.shape[2], torch.cat(biases) if biases else None
    return PackedMatrix(panels, layers[0].matrix.format, num_outputs, scale_PL=None, bias_PL=bias_PL)
