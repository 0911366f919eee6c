"""Grouped-query attention of a decode step as one call on the CPU.

At a step of one token a sequence, a family's own module spends its time between some thirty operators. Steps that also
hold a prompt's tokens go through it as ever.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

from cluster.serving.attention_batch import AttentionBatch
from cluster.serving.packed_linear import PackedLinear
from experts.ops.cpu_threads import ThreadTeam
from experts.ops.packed_matmul import PackedMatrix

# Families whose attention is exactly this: biases where their layers have them, norms of queries and keys over a head
# where they have `q_norm`, rotary halves, a window.
_FAMILIES = {"MixtralAttention", "Qwen3MoeAttention"}
# Rows of a step below which a second thread is not worth waking.
_SHARED_ROWS = 4
_NO_WINDOW = 1 << 62


class GroupedQueryDecode(nn.Module):
    """In place of a family's attention module, which it keeps for prompts."""

    def __init__(self, attention: Any, team: ThreadTeam) -> None:
        super().__init__()
        from cluster.serving._numba.grouped_query_decode import compile_grouped_query_decode

        self.attention = attention
        self._team = team
        self._layer: int = attention.layer_idx
        self._scale: float = attention.scaling
        self._window: int = getattr(attention.config, "sliding_window", None) or _NO_WINDOW
        self._head_dim: int = attention.head_dim
        self._heads = attention.q_proj.out_features // self._head_dim
        self._into = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self._onto: PackedMatrix = attention.o_proj.matrix
        norm = getattr(attention, "q_norm", None)
        none = np.empty(0, np.float32)
        self._norms = none, none, 0.0
        if norm is not None:
            self._norms = norm.weight.numpy(), attention.k_norm.weight.numpy(), norm.variance_epsilon
        self._addresses = [np.array(matrix.addresses())[:, None] for matrix in (self._into, self._onto)]
        self._panels = np.array([len(self._into.panels), len(self._onto.panels)])
        self._compiled = compile_grouped_query_decode(
            heads=self._heads,
            kv_heads=attention.k_proj.out_features // self._head_dim,
            head_dim=self._head_dim,
            normed=norm is not None,
            in_format=self._into.format,
            in_biased=self._into.bias_PL is not None,
            out_format=self._onto.format,
            out_biased=self._onto.bias_PL is not None,
        )

    @staticmethod
    def fits(attention: Any) -> bool:
        """Whether a module's decode steps can be computed here."""
        if type(attention).__name__ not in _FAMILIES:
            return False
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        if not all(isinstance(each, PackedLinear) for each in projections):
            return False
        into = [each.matrix for each in projections[:3]]
        alike = {(matrix.format, matrix.bias_PL is None) for matrix in into}
        return len(alike) == 1 and all(matrix.num_columns == matrix.num_outputs for matrix in into)

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, T, H]; see transformers' attention modules for the rest."""
        batch: AttentionBatch = arguments["attention_batch"]
        if batch.prefill_spans:
            output: tuple[torch.Tensor, None] = self.attention(hidden_states=hidden_states, **arguments)
            return output
        started = time.perf_counter()
        hidden_TH = hidden_states[0].contiguous().numpy()
        cos_TD, sin_TD = (each[0].contiguous().numpy() for each in arguments["position_embeddings"])
        num_rows = len(hidden_TH)
        projected_TP = np.empty((num_rows, self._into.num_columns), np.float32)
        summed_TV = np.empty((num_rows, self._heads * self._head_dim), np.float32)
        out_TP = torch.empty(num_rows, self._onto.num_columns)
        out = out_TP.numpy()
        pieces = [
            (group, group.num_rows * piece // shares, group.num_rows * (piece + 1) // shares)
            for group in batch.decode_groups
            for shares in [self._team.num_threads if group.num_rows >= _SHARED_ROWS else 1]
            for piece in range(shares)
        ]

        def run(index: int) -> None:
            group, first, last = pieces[index]
            rows = slice(group.start + first, group.start + last)
            self._compiled(
                *(hidden_TH[rows], *self._addresses, self._panels, *self._norms, cos_TD[rows], sin_TD[rows]),
                *(group.arena.key.numpy(), group.arena.value.numpy(), self._layer),
                *(group.slots_B.numpy()[first:last], group.positions_B.numpy()[first:last]),
                *(self._window, self._scale, projected_TP[rows], summed_TV[rows], out[rows]),
            )

        self._team.run(run, len(pieces))
        batch.seconds += time.perf_counter() - started
        return out_TP[:, : self._onto.num_outputs].unsqueeze(0), None


def _join(*layers: PackedLinear) -> PackedMatrix:
    """The layers' matrices one below the other, of which theirs become views."""
    matrices = [layer.matrix for layer in layers]
    panels = torch.cat([matrix.panels for matrix in matrices])
    biases = [matrix.bias_PL for matrix in matrices if matrix.bias_PL is not None]
    joined = PackedMatrix(panels, len(panels) * panels.shape[2], None, torch.cat(biases) if biases else None)
    first = 0
    for layer in layers:
        last = first + len(layer.matrix.panels)
        bias = None if joined.bias_PL is None else joined.bias_PL[first:last]
        layer.matrix = PackedMatrix(panels[first:last], layer.out_features, None, bias)
        first = last
    return joined


def compile_attention(model: nn.Module, team: ThreadTeam) -> None:
    """Replace the attention modules that fit; their layers are packed already."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if GroupedQueryDecode.fits(child):
                setattr(module, name, GroupedQueryDecode(child, team))
