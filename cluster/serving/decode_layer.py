"""Attention of a decode step as one call on the CPU.

At a step of one token a sequence, a family's own module spends its time between some thirty operators. Steps that also
hold a prompt's tokens go through it as ever, but for short prompts where their tokens, one by one, are no more work.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cluster.serving.attention_batch import AttentionBatch
from cluster.serving.kv_cache import Arena
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

    # A prompt's tokens are taken one by one up to this position.
    most_prompt = 0

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
        pieces = [*self._pieces(batch)]
        # A prompt is one thread's from projection to projection: there have to be enough for all threads.
        if batch.prefill_spans and (
            len(pieces) < self._team.num_threads or any(span.end > self.most_prompt for span in batch.prefill_spans)
        ):
            output: tuple[torch.Tensor, None] = self.attention(
                hidden_states=hidden_states, team=self._team, **arguments
            )
            return output
        started = time.perf_counter()
        hidden_TH = hidden_states[0].contiguous().numpy()
        cos_TD, sin_TD = (each[0].contiguous().numpy() for each in self._angles(arguments["position_embeddings"]))
        assert cos_TD.shape[1] >= self._rope_dim // 2  # compiled code looks at no bounds
        out_TP = torch.empty(len(hidden_TH), self._onto.num_columns)
        out = out_TP.numpy()

        def run(index: int) -> None:
            arena, rows, slots_T, positions_T = pieces[index]
            self._compute(
                DecodeRows(
                    *(hidden_TH[rows], cos_TD[rows], sin_TD[rows], arena.key.numpy(), arena.value.numpy()),
                    *(slots_T, positions_T, out[rows]),
                )
            )

        self._team.run(run, len(pieces))
        batch.seconds += time.perf_counter() - started
        return out_TP[:, : self._onto.num_outputs].unsqueeze(0), None

    def _pieces(self, batch: AttentionBatch) -> Iterator[tuple[Arena, slice, Ints, Ints]]:
        """Rows that a thread computes, in order: whose cache, which rows, their slots and positions."""
        for group in batch.decode_groups:
            slots_B, positions_B = group.slots_B.numpy(), group.positions_B.numpy()
            shares = self._team.num_threads if group.num_rows >= _SHARED_ROWS else 1
            for share in range(shares):
                rows = slice(group.num_rows * share // shares, group.num_rows * (share + 1) // shares)
                yield (
                    group.arena,
                    slice(group.start + rows.start, group.start + rows.stop),
                    slots_B[rows],
                    positions_B[rows],
                )
        for span in batch.prefill_spans:  # whole: a token looks at those before it
            positions_T = np.arange(span.begin, span.end)
            yield span.slot.arena, slice(span.start, span.stop), np.full_like(positions_T, span.slot.index), positions_T
