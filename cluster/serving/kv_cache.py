"""Where sequences keep their keys and values: slots in arenas of a few fixed lengths.

A sequence owns one slot. Slots of one capacity lie side by side in one arena, live ones always first, so that the
decode step of all of them reads the cache through a view: no page table, no gather, no copy. A sequence that outgrows
its slot moves to an arena of twice the capacity; at most half of a slot is unused. Arenas grow by doubling and are
cut back when another needs the room; the sum of what they hold never passes `memory` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experts.errors import ConfigError

MIN_CAPACITY = 256


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
    """Slots of one capacity C.  key: [N layers, S slots, kv heads, C, key_dim], value likewise."""

    def __init__(self, layout: KVLayout, capacity: int) -> None:
        self.capacity = capacity
        self.slot_bytes = capacity * layout.bytes_per_token
        self.slots: list[Slot] = []
        self._layout = layout
        self.num_slots = 0
        self.key: torch.Tensor
        self.value: torch.Tensor
        self.resize(0)

    @property
    def num_bytes(self) -> int:
        return self.num_slots * self.slot_bytes

    def resize(self, num_slots: int) -> None:
        """Room for `num_slots`, at least as many as live; what is live keeps its index."""
        assert num_slots >= len(self.slots)
        old = (self.key, self.value) if self.num_slots else None
        layout, live = self._layout, len(self.slots)
        # Zeros, because what is masked still takes part: a masked weight of 0 times a NaN would be a NaN.
        shape = (layout.num_layers, num_slots, layout.num_kv_heads, self.capacity, layout.key_dim)
        self.key = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        if layout.latent:
            self.value = self.key[..., : layout.value_dim]
        else:
            self.value = torch.zeros((*shape[:-1], layout.value_dim), dtype=layout.dtype, device=layout.device)
        if old and live:
            self.key[:, :live] = old[0][:, :live]
            if not layout.latent:
                self.value[:, :live] = old[1][:, :live]
        self.num_slots = num_slots

    def add(self) -> Slot:
        assert len(self.slots) < self.num_slots
        slot = Slot(self, len(self.slots))
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
        self._copy_rows(source, source_index, index, slot.length)
        placeholder = Slot(source, source_index)
        source.slots[source_index] = placeholder
        source.remove(placeholder)
        slot.arena, slot.index = self, index
        self.slots.append(slot)

    def _copy_rows(self, source: Arena, source_index: int, index: int, length: int) -> None:
        self.key[:, index, :, :length] = source.key[:, source_index, :, :length]
        if not self._layout.latent:
            self.value[:, index, :, :length] = source.value[:, source_index, :, :length]


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
        if self._fits(arena, wanted):
            arena.resize(wanted)
            return True
        for other in self.arenas:
            if other is not arena and other.num_slots > len(other.slots):
                other.resize(len(other.slots))
        for num_slots in (wanted, live + 1):
            if self._fits(arena, num_slots):
                arena.resize(num_slots)
                return True
        return False

    def _fits(self, arena: Arena, num_slots: int) -> bool:
        others = sum(other.num_bytes for other in self.arenas if other is not arena)
        return others + num_slots * arena.slot_bytes <= self.memory
