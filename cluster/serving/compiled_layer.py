"""A step of a decoder layer as one call up to its MLP, on the CPU.

At a step of one token a sequence, a family's own modules spend their time between some forty operators, and with
prompts in passing memory from one to the next.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cluster.serving.attention_batch import AttentionBatch, LayerPiece, Shapes
from cluster.serving.compiled_norm import CompiledNorm
from cluster.serving.kv_cache import Arena
from experts.ops.cpu_threads import ThreadTeam

if TYPE_CHECKING:
    from cluster.serving._numba.decode_layers import Attention

_Numbers = npt.NDArray[np.int64]
# Rows of a step that are worth another thread's waking.
_ROWS_A_THREAD = 2
# Rows that the caller is done with before the others are awake, but not more than so large a part of all.
_ROWS_AHEAD, _ROWS_A_ROW_AHEAD = 2, 8
# Tokens that are worth a cut of their own: each reads the layer's weights anew.
_CUT = 64
# What a compiled function gets last, to compute all of a layer, or one half and then the other: up to the cache, which
# later tokens of a prompt read, and from there.
_WHOLE, _FIRST_HALF, _SECOND_HALF = 0, 1, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class AtOnce:
    """How a prompt's tokens are computed all at once, from what is made of every position so far.

    compiled:  a function like CompiledLayer's; before what says which half it is, it gets memory for that, which all
               parts of a prompt share, and the position from which on a part is to fill it
    pays:      whether it does for so many tokens, of so many positions
    work:      the shapes of what it works in, but for the rows
    columns:   float32 numbers made of a position
    multiple:  memory is for a multiple of so many positions
    """

    compiled: Callable[..., None]
    pays: Callable[[int, int], bool]
    work: Shapes
    columns: int
    multiple: int = 1

    def memory(self, positions: int) -> torch.Tensor:
        """[at least as many positions, columns] for what is made of them."""
        return torch.empty(-(-positions // self.multiple) * self.multiple, self.columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Rows that a thread computes: whose cache, their slots and positions; where prompts are taken at once, memory."""

    arena: Arena
    rows: slice
    slots_T: torch.Tensor
    positions_T: torch.Tensor
    prepared_LC: torch.Tensor | None = None
    begin: int = 0

    def cut(self, threads: int) -> Iterator[_Part]:
        """A part or two for each thread, the last first. Later tokens look at more others: of two parts each, every
        thread gets a short one and a long one."""
        count = len(self.slots_T)
        shares = min(2 * threads, max(threads, count // _CUT))
        ends = sorted({count * share // shares for share in range(shares + 1)}, reverse=True)
        for last, first in itertools.pairwise(ends):
            yield replace(
                self,
                rows=slice(self.rows.start + first, self.rows.start + last),
                slots_T=self.slots_T[first:last],
                positions_T=self.positions_T[first:last],
                begin=int(self.positions_T[first]) if first else self.begin,
            )


class CompiledLayer(nn.Module, ABC):
    """In place of a family's decoder layer, of which only the MLP is kept.

    attention: the same for rows of one of several layers
    compiled:  writes hidden states after attention, and what the MLP gets; its arguments are a step's rows, the layer's
               norms, `constants`, and what all layers of a step share, see `_stages`
    work:      the shapes of what it works in, but for the rows
    rope_dim:  how many numbers of a head turn
    at_once:   for prompts' tokens where it pays, which otherwise are taken one by one
    """

    def __init__(
        self,
        layer: Any,
        team: ThreadTeam,
        *,
        attention: Attention,
        compiled: Callable[..., None],
        constants: tuple[Any, ...],
        work: Shapes,
        rope_dim: int,
        at_once: AtOnce,
    ) -> None:
        super().__init__()
        norms = layer.input_layernorm, layer.post_attention_layernorm
        self.mlp = layer.mlp
        self.index: int = layer.self_attn.layer_idx
        self._team = team
        self.attention = attention
        self._compiled = compiled
        self.constants = (
            np.stack([norm.weight.numpy() for norm in norms]),
            np.array([norm.variance_epsilon for norm in norms], np.float32),
            *constants,
        )
        self._work = work
        self._shapes = (*work, *at_once.work, (at_once.columns,))
        self._rope_dim = rope_dim
        self._at_once = at_once
        self._hidden_size = len(norms[0].weight)

    @staticmethod
    @abstractmethod
    def fits(layer: Any) -> bool:
        """Whether a module can be computed here."""

    @staticmethod
    @abstractmethod
    def _caches(arena: Arena, layer: int) -> tuple[torch.Tensor, ...]:
        """What the compiled function reads and writes of an arena."""

    @staticmethod
    def angles(position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [1, T, D] of what the model's rotary embedding returned."""
        cos, sin = position_embeddings
        return cos, sin

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        """hidden_states: float32 [1, T, H], same shape back; for the rest see transformers' decoder layers."""
        batch: AttentionBatch = arguments["attention_batch"]
        stages = batch.layer_stages.get(self._shapes)
        if stages is None:
            stages = batch.layer_stages[self._shapes] = self._stages(batch, arguments["position_embeddings"])
        started = time.perf_counter()
        assert hidden_states.shape == (1, batch.num_tokens, self._hidden_size)  # compiled code looks at no bounds
        both_21TH = torch.empty(2, *hidden_states.shape)
        hidden_TH, (residual_TH, mlp_in_TH) = hidden_states[0].contiguous().numpy(), both_21TH.numpy()[:, 0]
        both, constants = (self._compiled, self._at_once.compiled), self.constants

        for pieces in stages:

            def run(index: int, pieces: list[LayerPiece] = pieces) -> None:
                rows, at_once, angles, arena, rest = pieces[index]
                caches = (cache.numpy() for cache in self._caches(arena, self.index))
                both[at_once](hidden_TH[rows], residual_TH[rows], mlp_in_TH[rows], *constants, *angles, *caches, *rest)

            self._team.run(run, len(pieces))
        batch.seconds += time.perf_counter() - started
        residual_1TH, mlp_in_1TH = both_21TH.unbind()
        return residual_1TH.add_(self.mlp(mlp_in_1TH))

    def decode_parts(self, batch: AttentionBatch, num_layers: int) -> tuple[_Numbers, _Numbers, _Numbers]:
        """Of this layer and those after it, in a step in which every sequence decodes, int64: [L, P, 6], rows of each
        part (first, and after the last), addresses of its caches, how many slots there are, and how long; [T] slots
        and [T] positions of all rows."""
        parts = [*self._decoding(batch)]
        parts_LP6 = np.empty((num_layers, len(parts), 6), np.int64)
        for number, part in enumerate(parts):
            arena = part.arena
            parts_LP6[:, number, :2] = part.rows.start, part.rows.stop
            parts_LP6[:, number, 2:4] = arena.addresses_N2[self.index : self.index + num_layers]
            parts_LP6[:, number, 4:] = arena.num_slots, arena.capacity
        groups = batch.decode_groups
        slots_T = torch.cat([group.slots_B for group in groups])
        positions_T = torch.cat([group.positions_B for group in groups])
        assert len(slots_T) == batch.num_tokens  # compiled code looks at no bounds
        return parts_LP6, slots_T.numpy(), positions_T.numpy()

    def work_for(self, num_rows: int) -> tuple[npt.NDArray[np.float32], ...]:
        """What the compiled function works in."""
        return tuple(np.empty((num_rows, *shape), np.float32) for shape in self._work)

    def _stages(self, batch: AttentionBatch, position_embeddings: Any) -> list[list[LayerPiece]]:
        """What a thread computes at a time: which rows, and their cosines and sines, arena, slots, positions and work.

        One stage after the other.
        """
        prompts, halves, threads = [*self._prompts(batch)], [_WHOLE], self._team.num_threads
        if prompts and max(len(part.slots_T) for part in prompts) * threads > batch.num_tokens:
            # One thread would be at the longest while others wait.
            prompts, halves = [cut for part in prompts for cut in part.cut(threads)], [_FIRST_HALF, _SECOND_HALF]
        parts = [*prompts, *self._decoding(batch)]
        cos_TD, sin_TD = (each[0].contiguous().numpy() for each in self.angles(position_embeddings))
        assert cos_TD.shape[1] >= self._rope_dim // 2  # compiled code looks at no bounds
        pieces = [(part, (cos_TD[part.rows], sin_TD[part.rows]), tuple(self._arguments(part))) for part in parts]
        return [
            [
                (part.rows, part.prepared_LC is not None, angles, part.arena, (*rest, half))
                for part, angles, rest in pieces
            ]
            for half in halves
        ]

    def _arguments(self, part: _Part) -> Iterator[Any]:
        yield from (part.slots_T.numpy(), part.positions_T.numpy())
        for shape in self._work if part.prepared_LC is None else self._at_once.work:
            yield np.empty((len(part.slots_T), *shape), np.float32)
        if part.prepared_LC is not None:
            yield from (part.prepared_LC.numpy(), part.begin)

    def _decoding(self, batch: AttentionBatch) -> Iterator[_Part]:
        for group in batch.decode_groups:
            shares = max(1, min(self._team.num_threads, group.num_rows // _ROWS_A_THREAD))
            ahead = min(_ROWS_AHEAD, group.num_rows // _ROWS_A_ROW_AHEAD) if shares > 1 else 0
            ends = [0, *(ahead + (group.num_rows - ahead) * share // shares for share in range(1, shares + 1))]
            for first, last in itertools.pairwise(ends):
                yield _Part(
                    arena=group.arena,
                    rows=slice(group.start + first, group.start + last),
                    slots_T=group.slots_B[first:last],
                    positions_T=group.positions_B[first:last],
                )

    def _prompts(self, batch: AttentionBatch) -> Iterator[_Part]:
        """Uncut: a token looks at those before it."""
        for span in batch.prefill_spans:
            positions_T = torch.arange(span.begin, span.end)
            pays = self._at_once.pays(len(positions_T), span.end)
            yield _Part(
                arena=span.slot.arena,
                rows=slice(span.start, span.stop),
                slots_T=torch.full_like(positions_T, span.slot.index),
                positions_T=positions_T,
                prepared_LC=self._at_once.memory(span.end) if pays else None,
            )


def has_compiled_norms(layer: Any) -> bool:
    """Whether the norms before and after attention are those that compiled functions compute."""
    return isinstance(layer.input_layernorm, CompiledNorm) and isinstance(layer.post_attention_layernorm, CompiledNorm)
