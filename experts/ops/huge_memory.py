"""Memory in huge pages, for what is read from its first byte to its last."""

from __future__ import annotations

import math
import mmap
import threading
from contextlib import suppress

import torch

# Of what is asked of the system at a time, unless more is wanted: most expert matrices are smaller than a huge page.
_LEAST_BYTES = 32 << 20
# Numbers begin where a cache line does.
_ALIGNMENT = 64

_lock = threading.Lock()
_current: mmap.mmap | None = None
_used = 0


def huge_empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A CPU tensor of whatever numbers, in huge pages where the system gives any.

    Over small pages, whoever reads weights at the memory's rate waits to learn where the next ones lie, in a virtual
    machine twice over. Tensors share mappings: what one of them leaves is free when all others have gone.
    """
    global _current, _used
    size = math.prod(shape) * dtype.itemsize
    if not size or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    with _lock:
        if _current is None or _used + size > len(_current):
            _current, _used = mmap.mmap(-1, max(size, _LEAST_BYTES)), 0
            with suppress(OSError):  # a kernel without them
                _current.madvise(mmap.MADV_HUGEPAGE)
        place, memory = _used, _current
        _used += -(-size // _ALIGNMENT) * _ALIGNMENT
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=place).view(shape)
