"""One step's sequences as the attention function sees them: which row belongs to whom, and what each may look at.

Rows are ordered so that every part is one slice: first the sequences with a single new token, by arena and slot
(computed together, reading the cache through one view), then each sequence with several, its chunk of a prompt.
Index tensors and masks are made once a step and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.serving.kv_cache import Arena, Slot

Shapes = tuple[tuple[int, ...], ...]
# Rows that one thread computes, whether they are a prompt's taken at once, and what compiled code has to know of them:
# before the layer's cache, the arena that has it, and after it.
LayerPiece = tuple[slice, bool, tuple[Any, ...], Arena, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """`num_tokens` new tokens of the sequence in `slot`, `offset` after the `slot.length` that are there.

    offset: tokens in between; another micro-batch writes them before this one attends to them
    """

    slot: Slot
    num_tokens: int
    offset: int = 0

    @property
    def begin(self) -> int:
        """Position of the first of them in the sequence."""
        return self.slot.length + self.offset

    @property
    def end(self) -> int:
        """Position after the last."""
        return self.begin + self.num_tokens


@dataclass(kw_only=True, slots=True)
class DecodeGroup:
    """Sequences of one arena with one new token each.

    They have rows [start, stop) of the batch; slots [first_slot, first_slot + num_slots) of the arena are computed.

    rows_B:   slot of each row, counted from first_slot; None where there is a row for each slot
    slots_B, positions_B: where each row's key and value are written
    max_len:  longest sequence, the new token included
    """

    arena: Arena
    start: int
    stop: int
    first_slot: int
    num_slots: int
    rows_B: torch.Tensor | None
    slots_B: torch.Tensor
    positions_B: torch.Tensor
    lengths_S: torch.Tensor
    max_len: int
    all_full: bool
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def hidden_S111L(self, window: int | None) -> torch.Tensor | None:
        """True where a slot may not look; None where every slot sees everything up to max_len."""
        if window not in self.masks:
            if self.all_full and (window is None or window >= self.max_len):
                self.masks[window] = None
            else:
                positions_L = torch.arange(self.max_len, device=self.lengths_S.device)
                lengths_S1 = self.lengths_S[:, None]
                hidden_SL = positions_L >= lengths_S1
                if window is not None:
                    hidden_SL |= positions_L < lengths_S1 - window
                self.masks[window] = hidden_SL[:, None, None, None, :]
        return self.masks[window]


@dataclass(kw_only=True, slots=True)
class PrefillSpan:
    """One sequence's chunk: rows [start, stop) of the batch, positions [begin, end) of the sequence."""

    slot: Slot
    start: int
    stop: int
    begin: int
    end: int
    masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)

    def visible_TL(self, window: int | None, device: torch.device) -> torch.Tensor | None:
        """True where a row may look; None where plain causal masking of a square says it all."""
        if window not in self.masks:
            narrow = window is not None and window < self.end
            if self.begin == 0 and not narrow:
                self.masks[window] = None
            else:
                rows_T1 = torch.arange(self.begin, self.end, device=device)[:, None]
                columns_L = torch.arange(self.end, device=device)
                visible_TL = columns_L <= rows_T1
                if window is not None:
                    visible_TL &= columns_L > rows_T1 - window
                self.masks[window] = visible_TL
        return self.masks[window]


class AttentionBatch:
    """The step's layout. `order` says which chunk comes where: chunks[order[0]] has the first rows.

    layer_stages: what `cluster.serving.compiled_layer` prepares once for all layers that work in the same shapes
    seconds: time spent on attention so far, and on projections and norms where those are one call with it
    """

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        arenas = {id(chunk.slot.arena): chunk.slot.arena for chunk in chunks}
        singles: dict[int, list[int]] = {key: [] for key in arenas}
        spans: list[int] = []
        for index, chunk in enumerate(chunks):
            if chunk.num_tokens == 1:
                singles[id(chunk.slot.arena)].append(index)
            else:
                spans.append(index)
        self.order: list[int] = []
        self.decode_groups: list[DecodeGroup] = []
        self.prefill_spans: list[PrefillSpan] = []
        self.num_tokens = 0
        self.layer_stages: dict[Shapes, list[list[LayerPiece]]] = {}
        self.seconds = 0.0
        for key, members in singles.items():
            if members:
                members.sort(key=lambda index: chunks[index].slot.index)
                self._add_group(arenas[key], [chunks[index] for index in members], device)
                self.order += members
        for index in spans:
            chunk = chunks[index]
            start, self.num_tokens = self.num_tokens, self.num_tokens + chunk.num_tokens
            self.prefill_spans.append(
                PrefillSpan(slot=chunk.slot, start=start, stop=self.num_tokens, begin=chunk.begin, end=chunk.end)
            )
            self.order.append(index)

    def _add_group(self, arena: Arena, chunks: Sequence[Chunk], device: torch.device) -> None:
        start, self.num_tokens = self.num_tokens, self.num_tokens + len(chunks)
        first_slot = chunks[0].slot.index
        num_slots = chunks[-1].slot.index + 1 - first_slot
        lengths = [1] * num_slots
        for chunk in chunks:
            lengths[chunk.slot.index - first_slot] = chunk.end
        max_len = max(lengths)
        slots_B = torch.tensor([chunk.slot.index for chunk in chunks], device=device)
        self.decode_groups.append(
            DecodeGroup(
                arena=arena,
                start=start,
                stop=self.num_tokens,
                first_slot=first_slot,
                num_slots=num_slots,
                rows_B=None if num_slots == len(chunks) else slots_B - first_slot,
                slots_B=slots_B,
                positions_B=torch.tensor([chunk.begin for chunk in chunks], device=device),
                lengths_S=torch.tensor(lengths, device=device),
                max_len=max_len,
                all_full=min(lengths) == max_len,
            )
        )

    def write(self, layer: int, key_HTD: torch.Tensor, value_HTD: torch.Tensor | None) -> None:
        """Put the new tokens' keys and values ([kv heads, T, dim]) of one layer into their slots."""
        for tensor_HTD, name in ((key_HTD, "key"), (value_HTD, "value")):
            if tensor_HTD is None:
                continue
            for group in self.decode_groups:
                rows_BHD = tensor_HTD[:, group.start : group.stop].transpose(0, 1)
                getattr(group.arena, name)[layer][group.slots_B, :, group.positions_B] = rows_BHD
            for span in self.prefill_spans:
                slots = getattr(span.slot.arena, name)[layer]
                slots[span.slot.index, :, span.begin : span.end] = tensor_HTD[:, span.start : span.stop]
