from __future__ import annotations

import pytest
import torch

from cluster.serving.kv_cache import KVCache, KVLayout, Slot
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
    slot.arena.key[:, slot.index, :, :length] = value
    slot.arena.value[:, slot.index, :, :length] = value


def holds(slot: Slot, value: float) -> bool:
    rows = (slot.arena.key[:, slot.index, :, : slot.length], slot.arena.value[:, slot.index, :, : slot.length])
    return all(bool((tensor == value).all()) for tensor in rows)


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
