"""Where sequences keep their keys and values: slots in arenas of a few fixed lengths.

A sequence owns one slot. Slots of one capacity lie side by side in one arena, live ones always first, so that the
decode step of all of them reads the cache through a view: no page table, no gather, no copy. A sequence that outgrows
its slot moves to an arena of twice the capacity; at most half of a slot is unused. Arenas grow by doubling and are
cut back when another needs the room, layer by layer: the sum of what they hold never passes `memory` bytes, but for one
layer of an arena while that is resized.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from experts.errors import ConfigError

MIN_CAPACITY = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """What one token leaves in the cache of one layer.

    latent: multi-head latent attention; one row `[c_kv, k_rope]` of key_dim, the first value_dim of it are the value
    """

    num_layers: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    latent: bool = False

    @property
    def bytes_per_token(self) -> int:
        """Over all layers."""
        row = self.key_dim if self.latent else self.key_dim + self.value_dim
        return self.num_layers * self.num_kv_heads * row * self.dtype.itemsize


class Slot:
    """A sequence's place. `index` changes when another slot of the arena is freed, `arena` when the sequence grows.

    length: tokens whose keys and values are written
    """

    __slots__ = ("arena", "index", "length")

    def __init__(self, arena: Arena, index: int) -> None:
        self.arena = arena
        self.index = index
        self.length = 0


class Arena:
    """Slots of one capacity C.

    key:          of each layer, [S slots, kv heads, C, key_dim];  value: likewise
    addresses_N2: int64, where they lie
    """

    def __init__(self, layout: KVLayout, capacity: int) -> None:
        self.capacity = capacity
        self.slot_bytes = capacity * layout.bytes_per_token
        self.slots: list[Slot] = []
        self._layout = layout
        self.num_slots = 0
        # Slots from there on are zeros still.
        self._first_unused = 0
        self.key = [self._zeros(0, layout.key_dim) for _ in range(layout.num_layers)]
        self.value = [self._value_of(key) for key in self.key]
        self.addresses_N2 = self._addresses()

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    def resize(self, num_slots: int) -> None:
        """Room for `num_slots`, at least as many as live; what is live keeps its index.

        Raises RuntimeError where the device has not got the memory; what is live is there still, with no more room.
        """
        live = len(self.slots)
        assert num_slots >= live
        try:
            for layer in range(self._layout.num_layers):
                self._resize_layer(layer, num_slots, live)
        finally:
            self.addresses_N2 = self._addresses()
            # Those that were resized before memory ran out have room for both.
            self.num_slots = min(len(key) for key in self.key)
            self._first_unused = live

    def add(self) -> Slot:
        index = len(self.slots)
        assert index < self.num_slots
        if index < self._first_unused:
            self._clear(index, 0)
        self._first_unused = max(self._first_unused, index + 1)
        slot = Slot(self, index)
        self.slots.append(slot)
        return slot

    def remove(self, slot: Slot) -> None:
        """Free a slot; the last live one moves into the hole."""
        last = self.slots.pop()
        if last is slot:
            return
        self._copy_rows(self, last.index, slot.index, last.length)
        last.index = slot.index
        self.slots[slot.index] = last

    def adopt(self, slot: Slot) -> None:
        """Take over a sequence from a smaller arena."""
        source, source_index = slot.arena, slot.index
        index = len(self.slots)
        assert index < self.num_slots
        self._copy_rows(source, source_index, index, slot.length)
        self._first_unused = max(self._first_unused, index + 1)
        placeholder = Slot(source, source_index)
        source.slots[source_index] = placeholder
        source.remove(placeholder)
        slot.arena, slot.index = self, index
        self.slots.append(slot)

    def _copy_rows(self, source: Arena, source_index: int, index: int, length: int) -> None:
        for layer in range(self._layout.num_layers):
            self.key[layer][index, :, :length] = source.key[layer][source_index, :, :length]
            if not self._layout.latent:
                self.value[layer][index, :, :length] = source.value[layer][source_index, :, :length]
        if index < self._first_unused:
            self._clear(index, length)

    def _clear(self, index: int, begin: int) -> None:
        """What is masked still takes part: a weight of 0 times a NaN, of who was there before, would be a NaN."""
        for value in self.value:
            value[index, :, begin:] = 0

    def _resize_layer(self, layer: int, num_slots: int, live: int) -> None:
        layout, old_key, old_value = self._layout, self.key[layer], self.value[layer]
        if not live:
            self.key[layer] = self.value[layer] = old_key = old_value = self._zeros(0, 0)
        key = self._zeros(num_slots, layout.key_dim)
        value = self._value_of(key)
        if live:
            key[:live] = old_key[:live]
            value[:live] = old_value[:live]
        self.key[layer], self.value[layer] = key, value

    def _zeros(self, num_slots: int, dim: int) -> torch.Tensor:
        layout = self._layout
        return torch.zeros(num_slots, layout.num_kv_heads, self.capacity, dim, dtype=layout.dtype, device=layout.device)

    def _value_of(self, key: torch.Tensor) -> torch.Tensor:
        layout = self._layout
        return key[..., : layout.value_dim] if layout.latent else self._zeros(len(key), layout.value_dim)

    def _addresses(self) -> npt.NDArray[np.int64]:
        return np.array([(key.data_ptr(), value.data_ptr()) for key, value in zip(self.key, self.value, strict=True)])


class KVCache:
    """All sequences' keys and values, bounded by `memory` bytes. Used by the engine's thread alone."""

    def __init__(self, layout: KVLayout, *, memory: int, max_num_seqs: int, max_model_len: int) -> None:
        """Raises ConfigError where not even one sequence of `max_model_len` tokens fits."""
        needed = max_model_len * layout.bytes_per_token
        if memory < needed:
            raise ConfigError(
                f"engine.kv_cache_memory is {memory} bytes, but one sequence of engine.max_model_len "
                f"({max_model_len} tokens) takes {needed}: raise the first or lower the second "
                f"(to {memory // layout.bytes_per_token} tokens at most)"
            )
        self.layout = layout
        self.memory = memory
        self._max_num_seqs = max_num_seqs
        self.arenas: list[Arena] = []
        capacity = MIN_CAPACITY
        while capacity < max_model_len:
            self.arenas.append(Arena(layout, capacity))
            capacity *= 2
        self.arenas.append(Arena(layout, max_model_len))

    @property
    def usage(self) -> float:
        """Live slots' share of the memory, 0 to 1."""
        return sum(len(arena.slots) * arena.slot_bytes for arena in self.arenas) / self.memory

    def allocate(self, num_tokens: int) -> Slot | None:
        """A slot for a sequence that will soon hold `num_tokens`; None while there is no room."""
        arena = self._arena_for(num_tokens)
        return arena.add() if self._make_room(arena) else None

    def reserve(self, slot: Slot, num_tokens: int) -> bool:
        """Let the slot hold `num_tokens`, moving it if it must; False while there is no room."""
        if num_tokens <= slot.arena.capacity:
            return True
        arena = self._arena_for(num_tokens)
        if not self._make_room(arena):
            return False
        arena.adopt(slot)
        return True

    def free(self, slot: Slot) -> None:
        slot.arena.remove(slot)

    def _arena_for(self, num_tokens: int) -> Arena:
        return next(arena for arena in self.arenas if arena.capacity >= num_tokens)

    def _make_room(self, arena: Arena) -> bool:
        live = len(arena.slots)
        if live < arena.num_slots:
            return True
        wanted = max(live + 1, min(2 * live, self._max_num_seqs))
        if self._fits(arena, wanted) and _resize(arena, wanted):
            return True
        for other in self.arenas:
            if other is not arena and other.num_slots > len(other.slots):
                other.resize(len(other.slots))
        return any(
            self._fits(arena, num_slots) and _resize(arena, num_slots)
            for num_slots in dict.fromkeys((wanted, live + 1))
        )

    def _fits(self, arena: Arena, num_slots: int) -> bool:
        others = sum(other.num_bytes for other in self.arenas if other is not arena)
        return others + num_slots * arena.slot_bytes <= self.memory


def _resize(arena: Arena, num_slots: int) -> bool:
    """False where the device has less memory than the engine was told."""
    try:
        arena.resize(num_slots)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        log.warning(
            "no memory for %d slots of %d bytes (lower engine.kv_cache_memory): %s",
            *(num_slots, arena.slot_bytes, str(error).partition("\n")[0]),
        )
        return False
    return True
