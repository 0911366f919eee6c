"""A gated MLP as one call on the CPU, in place of the five operators that a family's own module makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cluster.serving.packed_linear import PackedLinear, can_join, join_layers
from experts.ops.cpu_threads import ThreadTeam

# Families whose shared experts and dense layers are exactly `down(act(gate(x)) * up(x))`.
_FAMILIES = {"Qwen3MoeMLP", "DeepseekV2MLP", "DeepseekV3MLP"}
# With more rows operators take little of the time, and what lies between them much memory.
_MOST_ROWS = 64


class CompiledMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))` in float32: an expert whose rows are all tokens.

    mlp: the family's module, which many rows go through, and those for which threads share a matrix
    addresses, panels, formats: what compiled code has to know, see `compile_expert_mlp`
    sizes: columns of a row, of what is above its inner values, of those, and of the result
    """

    def __init__(self, mlp: Any, team: ThreadTeam) -> None:
        super().__init__()
        # Loads LLVM, which a GPU's process does not need.
        from experts.ops._numba.expert_mlp import compile_expert_mlp

        self.mlp = mlp
        self._team = team
        self._up, self._down = join_layers(mlp.gate_proj, mlp.up_proj), mlp.down_proj.matrix
        self._in_features: int = mlp.gate_proj.in_features
        self.sizes = self._in_features, self._up.num_columns, mlp.down_proj.in_features, self._down.num_columns
        self.addresses = np.array([*self._up.addresses(), *self._down.addresses()])[:, None]
        self.panels = np.array([len(self._up.panels), len(self._down.panels)])
        self.formats = self._up.format, self._down.format
        self._rows = np.arange(_MOST_ROWS, dtype=np.int32)
        self._compiled = compile_expert_mlp(
            "silu", gated=True, biased=False, up_format=self.formats[0], down_format=self.formats[1]
        )

    @staticmethod
    def fits(mlp: Any) -> bool:
        """Whether a module can be computed here."""
        return (
            type(mlp).__name__ in _FAMILIES
            and mlp.config.hidden_act == "silu"
            and isinstance(mlp.down_proj, PackedLinear)
            and can_join(mlp.gate_proj, mlp.up_proj)
            and all(layer.matrix.bias_PL is None for layer in (mlp.gate_proj, mlp.down_proj))
        )

    @property
    def num_columns(self) -> int:
        """Of the result, whole panels."""
        columns: int = self._down.num_columns
        return columns

    def takes(self, num_rows: int) -> bool:
        """Whether so many rows are for one call, and one thread."""
        shared = self._team.num_threads > 1 and self._down.worth_sharing(num_rows)
        return num_rows <= _MOST_ROWS and not shared

    def work_for(self, num_rows: int) -> tuple[npt.NDArray[np.float32], ...]:
        """What the compiled function works in."""
        return tuple(np.empty((num_rows, size), np.float32) for size in self.sizes[:-1])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: float32 [..., H], same shape back."""
        rows_RH = hidden.reshape(-1, self._in_features)
        num_rows = len(rows_RH)
        if not self.takes(num_rows):
            output: torch.Tensor = self.mlp(hidden)
            return output
        out_RP = np.empty((num_rows, self.num_columns), np.float32)
        self._compiled(
            *(self.addresses, self.panels, np.array([0, num_rows]), rows_RH.contiguous().numpy()),
            *(self._rows[:num_rows], np.inf, 0.0, *self.work_for(num_rows), out_RP),
        )
        return torch.from_numpy(out_RP)[:, : self._down.num_outputs].reshape(hidden.shape)


def compile_mlps(model: nn.Module, team: ThreadTeam) -> None:
    """Replace every module that CompiledMlp fits."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if CompiledMlp.fits(child):
                setattr(module, name, CompiledMlp(child, team))
