from __future__ import annotations

import dataclasses
import weakref

import pytest
import torch

from cluster.serving.kv_cache import Arena, KVCache, KVLayout, Slot
from experts.errors import ConfigError

LAYOUT = KVLayout(num_layers=2, num_kv_heads=2, key_dim=4, value_dim=3, dtype=torch.float32, device=torch.device("cpu"))
LATENT = KVLayout(
    num_layers=2, num_kv_heads=1, key_dim=6, value_dim=4, dtype=torch.float32, device=torch.device("cpu"), latent=True
)


def cache_of(tokens: int, *, layout: KVLayout = LAYOUT, max_num_seqs: int = 8, max_model_len: int = 1024) -> KVCache:
    return KVCache(
        layout, memory=tokens * layout.bytes_per_token, max_num_seqs=max_num_seqs, max_model_len=max_model_len
    )


def fill(slot: Slot, length: int, value: float) -> None:
    slot.length = length
    for layer in (*slot.arena.key, *slot.arena.value):
        layer[slot.index, :, :length] = value


def holds(slot: Slot, value: float) -> bool:
    layers = (*slot.arena.key, *slot.arena.value)
    return all(bool((layer[slot.index, :, : slot.length] == value).all()) for layer in layers)


def allocated(cache: KVCache) -> int:
    return sum(arena.num_bytes for arena in cache.arenas)


def test_bytes_per_token() -> None:
    assert LAYOUT.bytes_per_token == 2 * 2 * (4 + 3) * 4
    assert LATENT.bytes_per_token == 2 * 6 * 4


@pytest.mark.parametrize("layout", [LAYOUT, LATENT])
def test_contents_survive_frees_growth_and_moves(layout: KVLayout) -> None:
    cache = cache_of(8192, layout=layout)
    slots = []
    for value in range(1, 6):
        slot = cache.allocate(100)
        assert slot is not None
        fill(slot, 100, float(value))
        slots.append(slot)
    cache.free(slots.pop(1))
    assert cache.reserve(slots[0], 300)
    assert cache.reserve(slots[2], 700)
    assert [slot.arena.capacity for slot in slots] == [512, 256, 1024, 256]
    for slot, value in zip(slots, (1, 3, 4, 5), strict=True):
        assert holds(slot, value)
    for arena in cache.arenas:
        assert [slot.index for slot in arena.slots] == list(range(len(arena.slots)))


def test_never_more_than_its_memory() -> None:
    cache = cache_of(2048)
    slots = []
    while (slot := cache.allocate(200)) is not None:
        slots.append(slot)
        assert allocated(cache) <= cache.memory
    assert len(slots) == 8
    assert cache.usage == 1.0
    assert not cache.reserve(slots[0], 257)
    for slot in slots[4:]:
        cache.free(slot)
    assert cache.reserve(slots[0], 600)
    assert allocated(cache) <= cache.memory


def test_growing_takes_a_layer_more_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = dataclasses.replace(LAYOUT, num_layers=16)
    held, most, zeros = [0], [0], Arena._zeros

    def counted(self: Arena, *shape: int) -> torch.Tensor:
        tensor = zeros(self, *shape)
        held[0] += tensor.nbytes
        most[0] = max(most[0], held[0])
        weakref.finalize(tensor, lambda nbytes: held.__setitem__(0, held[0] - nbytes), tensor.nbytes)
        return tensor

    monkeypatch.setattr(Arena, "_zeros", counted)
    cache = cache_of(24 * 256, layout=layout, max_num_seqs=100)
    slots = []
    while (slot := cache.allocate(200)) is not None:
        slots.append(slot)
    for slot in slots[::2]:
        cache.free(slot)
    assert cache.reserve(slots[1], 1000)
    assert len(slots) == 24
    assert most[0] <= cache.memory * (1 + 1 / layout.num_layers)


@pytest.mark.parametrize("layout", [LAYOUT, LATENT])
def test_nobody_finds_what_another_sequence_left(layout: KVLayout) -> None:
    """Not even where it is masked: a weight of 0 times a NaN is a NaN."""
    cache = cache_of(8192, layout=layout)
    first, ill, last = (cache.allocate(100) for _ in range(3))
    assert first is not None
    assert ill is not None
    assert last is not None
    fill(first, 10, 1.0)
    fill(ill, 100, float("nan"))
    fill(last, 20, 2.0)
    cache.free(ill)  # its place is the last one's now
    assert holds(last, 2.0)
    assert cache.reserve(first, 300)
    healed = cache.reserve(last, 300), cache.allocate(50), cache.allocate(50)
    assert all(healed)
    for arena in cache.arenas:
        for value in arena.value:
            assert value[: len(arena.slots)].isfinite().all()


def test_a_device_with_less_memory_than_promised_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, zeros = cache_of(8192), Arena._zeros
    slot = cache.allocate(100)
    assert slot is not None
    fill(slot, 100, 3.0)
    asked = []

    def scarce(self: Arena, num_slots: int, dim: int) -> torch.Tensor:
        asked.append(num_slots)
        if len(asked) > 3:  # in the middle of the second layer
            raise torch.OutOfMemoryError("no memory")
        return zeros(self, num_slots, dim)

    monkeypatch.setattr(Arena, "_zeros", scarce)
    assert cache.allocate(100) is None
    monkeypatch.undo()
    assert holds(slot, 3.0)
    other = cache.allocate(100)
    assert other is not None
    fill(other, 100, 4.0)
    assert holds(slot, 3.0)


def test_what_one_length_no_longer_needs_serves_another() -> None:
    cache = cache_of(1024)
    short = [cache.allocate(10) for _ in range(4)]
    assert cache.allocate(1000) is None
    for slot in short:
        assert slot is not None
        cache.free(slot)
    assert cache.allocate(1000) is not None


def test_the_last_capacity_is_the_longest_sequence() -> None:
    cache = cache_of(1000, max_model_len=1000)
    assert [arena.capacity for arena in cache.arenas] == [256, 512, 1000]


def test_too_little_for_one_sequence_says_what_to_change() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_memory.*max_model_len.*500 tokens"):
        cache_of(500)
