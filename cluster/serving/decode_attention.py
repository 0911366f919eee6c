"""Attention of a decode step as one call on the CPU.

At a step of one token a sequence, a family's own module spends its time between some thirty operators. Steps that also
hold a prompt's tokens go through it as ever.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cluster.serving.attention_batch import AttentionBatch
from experts.ops.cpu_threads import ThreadTeam
from experts.ops.packed_matmul import PackedMatrix

# Rows of a step from which a second thread is worth waking.
_SHARED_ROWS = 4

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class DecodeRows(NamedTuple):
    """Rows of a step whose sequences are in one arena, whose cache is `keys` and `values`."""

    hidden_TH: Floats
    cos_TD: Floats
    sin_TD: Floats
    keys: Floats
    values: Floats
    slots_T: Ints
    positions_T: Ints
    out_TP: Floats


class DecodeAttention(nn.Module, ABC):
    """In place of a family's attention module, which it keeps for prompts.

    onto:     the output projection
    rope_dim: how many numbers of a head turn
    """

    def __init__(self, attention: Any, onto: PackedMatrix, rope_dim: int, team: ThreadTeam) -> None:
        super().__init__()
        self._rope_dim = rope_dim
        self.attention = attention
        self._onto = onto
        self._team = team

    @abstractmethod
    def _compute(self, rows: DecodeRows) -> None:
        """Write what the cache gets, and the output."""

    def _angles(self, position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [1, T, D] of what the model's rotary embedding returned."""
        cos, sin = position_embeddings
        return cos, sin

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: float32 [1, T, H]; for the rest see transformers' attention modules."""
        batch: AttentionBatch = arguments["attention_batch"]
        if batch.prefill_spans:
            output: tuple[torch.Tensor, None] = self.attention(hidden_states=hidden_states, **arguments)
            return output
        started = time.perf_counter()
        hidden_TH = hidden_states[0].contiguous().numpy()
        cos_TD, sin_TD = (each[0].contiguous().numpy() for each in self._angles(arguments["position_embeddings"]))
        assert cos_TD.shape[1] >= self._rope_dim // 2  # compiled code looks at no bounds
        out_TP = torch.empty(len(hidden_TH), self._onto.num_columns)
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
            self._compute(
                DecodeRows(
                    *(hidden_TH[rows], cos_TD[rows], sin_TD[rows], group.arena.key.numpy(), group.arena.value.numpy()),
                    *(group.slots_B.numpy()[first:last], group.positions_B.numpy()[first:last], out[rows]),
                )
            )

        self._team.run(run, len(pieces))
        batch.seconds += time.perf_counter() - started
        return out_TP[:, : self._onto.num_outputs].unsqueeze(0), None
