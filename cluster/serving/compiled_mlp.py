"""A gated MLP as one call on the CPU, in place of the five operators that a family's own module makes."""

from __future__ import annotations

from typing import Any

import numpy as np
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
    """

    def __init__(self, mlp: Any, team: ThreadTeam) -> None:
        super().__init__()
        # Loads LLVM, which a GPU's process does not need.
        from experts.ops._numba.expert_mlp import compile_expert_mlp

        self.mlp = mlp
        self._team = team
        self._up, self._down = join_layers(mlp.gate_proj, mlp.up_proj), mlp.down_proj.matrix
        self._in_features: int = mlp.gate_proj.in_features
        self._sizes = self._in_features, self._up.num_columns, mlp.down_proj.in_features, self._down.num_columns
        self._addresses = np.array([*self._up.addresses(), *self._down.addresses()])[:, None]
        self._panels = np.array([len(self._up.panels), len(self._down.panels)])
        self._rows = np.arange(_MOST_ROWS, dtype=np.int32)
        self._compiled = compile_expert_mlp(
            "silu", gated=True, biased=False, up_format=self._up.format, down_format=self._down.format
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

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: float32 [..., H], same shape back."""
        rows_RH = hidden.reshape(-1, self._in_features)
        num_rows = len(rows_RH)
        if num_rows > _MOST_ROWS or (self._team.num_threads > 1 and self._down.worth_sharing(num_rows)):
            output: torch.Tensor = self.mlp(hidden)
            return output
        *work, out_RP = (np.empty((num_rows, size), np.float32) for size in self._sizes)
        self._compiled(
            *(self._addresses, self._panels, np.array([0, num_rows]), rows_RH.contiguous().numpy()),
            *(self._rows[:num_rows], np.inf, 0.0, *work, out_RP),
        )
        return torch.from_numpy(out_RP)[:, : self._down.num_outputs].reshape(hidden.shape)


def compile_mlps(model: nn.Module, team: ThreadTeam) -> None:
    """Replace every module that CompiledMlp fits."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if CompiledMlp.fits(child):
                setattr(module, name, CompiledMlp(child, team))
