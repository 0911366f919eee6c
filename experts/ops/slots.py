"""Where a card's expert weights lie: equal slots in chunks of memory, found through one table of addresses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from experts.errors import ConfigError

ALIGNMENT = 256  # of every part of a slot; TMA wants 16, a memory transaction 128
MAX_SLOTS = 1 << 16  # half a megabyte of addresses, never moved: CUDA graphs keep pointing to it


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One tensor inside a slot."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes without what aligns the next part."""
        return math.prod(self.shape) * self.dtype.itemsize


def lay_out(parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Part]:
    """Parts one after another, each at a multiple of ALIGNMENT."""
    layout: dict[str, Part] = {}
    offset = 0
    for name, (shape, dtype) in parts.items():
        layout[name] = Part(offset=offset, shape=shape, dtype=dtype)
        offset += math.ceil(layout[name].nbytes / ALIGNMENT) * ALIGNMENT
    return layout


class SlotStorage:
    """Equal slots in chunks that are allocated as slots come: no slot ever moves, none is copied to grow.

    addresses: int64 [MAX_SLOTS], first byte of each slot, on `device`
    chunk_bytes: about what a chunk has; at least one slot
    """

    def __init__(
        self,
        layout: Mapping[str, Part],
        device: torch.device,
        *,
        chunk_bytes: int = 1 << 28,
        max_slots: int = MAX_SLOTS,
    ) -> None:
        self._layout = layout
        self._device = device
        last = max(layout.values(), key=lambda part: part.offset)
        self.slot_bytes = math.ceil((last.offset + last.nbytes) / ALIGNMENT) * ALIGNMENT
        self._slots_per_chunk = max(1, chunk_bytes // self.slot_bytes)
        self._unused: list[torch.Tensor] = []  # views that keep their chunks alive
        self._used: dict[int, torch.Tensor] = {}
        self.addresses = torch.zeros(max_slots, dtype=torch.int64, device=device)

    def __contains__(self, slot: int) -> bool:
        return slot in self._used

    def place(self, slot: int) -> dict[str, torch.Tensor]:
        """Room for `slot`, by part; what it held before, if anything, is to be overwritten.

        Raises ConfigError when the card has no memory left or the slot has too high a number.
        """
        if slot >= len(self.addresses):
            raise ConfigError(f"slot {slot}: an expert group holds at most {len(self.addresses)} experts")
        if slot not in self._used:
            if not self._unused:
                self._grow()
            self._used[slot] = self._unused.pop()
            self.addresses[slot] = self._used[slot].data_ptr()
        room = self._used[slot]
        return {
            name: room[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)
            for name, part in self._layout.items()
        }

    def free(self, slot: int) -> None:
        """Give the room of `slot` to the next one that is placed."""
        self._unused.append(self._used.pop(slot))

    def _grow(self) -> None:
        for num_slots in (self._slots_per_chunk, 1):  # the last of the memory may hold a slot, but not a chunk
            try:
                chunk = torch.empty((num_slots, self.slot_bytes), dtype=torch.uint8, device=self._device)
            except torch.OutOfMemoryError:
                continue
            self._unused.extend(reversed(chunk.unbind()))
            return
        raise ConfigError(
            f"experts.groups: {self._device} has no room for another expert ({self.slot_bytes / 2**20:.0f} MiB) "
            f"beside the {len(self._used)} that it holds; use more groups, or quantise with model.quantization"
        )
