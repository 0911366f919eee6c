from __future__ import annotations

import mmap
import threading
import weakref

import pytest
import torch

from experts.ops import huge_memory
from experts.ops.huge_memory import huge_empty


@pytest.fixture(autouse=True)
def _new_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests hold is elsewhere."""
    monkeypatch.setattr(huge_memory, "_current", None)
    monkeypatch.setattr(huge_memory, "_LEAST_BYTES", 1 << 21)


def numbers(count: int, value: int) -> torch.Tensor:
    return huge_empty((count,), torch.int32).fill_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8])
def test_shape_dtype_and_place(dtype: torch.dtype) -> None:
    for shape in ((3, 5, 7), (1,), (0, 4), (2, 600, 1024)):
        tensor = huge_empty(shape, dtype)
        assert tensor.shape == shape
        assert tensor.dtype is dtype
        assert tensor.is_contiguous()
        assert not tensor.numel() or tensor.data_ptr() % 64 == 0


def test_tensors_of_several_threads_do_not_meet() -> None:
    made: list[tuple[int, torch.Tensor]] = []

    def make(first: int) -> None:
        for value in range(first, first + 50):
            made.append((value, numbers(1 + value * 997 % 60_000, value)))

    threads = [threading.Thread(target=make, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 200
    assert all(bool((tensor == value).all()) for value, tensor in made)


def test_a_mapping_goes_with_its_last_tensor() -> None:
    first = numbers(1000, 1)
    mapping = weakref.ref(huge_memory._current)
    second, elsewhere = numbers(1000, 2), numbers(1 << 20, 3)  # the last is more than a mapping is wide
    assert huge_memory._current is not mapping()
    del first
    assert second.tolist() == [2] * 1000
    assert mapping() is not None
    del second
    assert mapping() is None
    assert bool((elsewhere == 3).all())


def test_without_huge_pages_there_is_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert numbers(10, 3).tolist() == [3] * 10
