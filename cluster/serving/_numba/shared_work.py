"""Threads in compiled code that wait for each other, and the clock, for others to call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from experts.ops._numba.object_cache import part
from experts.wire._numba.sockets import recv, send

_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_MONOTONIC = 1
_NO_SIGNAL = 0x4000
# A signal may come between; nothing else goes wrong at one end while somebody is at the other.
_TRIES = 100


@part(())
def tell(socket: Any) -> None:
    """Wake whoever hears at the other end, if anybody still is."""
    one = np.ones(1, np.uint8)
    for _ in range(_TRIES):
        if send(socket, one.ctypes.data, 1, _NO_SIGNAL) == 1:
            return


@part(())
def hear(socket: Any) -> Any:
    """Wait until the other end tells; False where it is closed."""
    one = np.ones(1, np.uint8)
    count = np.int64(-1)
    while count < 0:  # a signal came between
        count = recv(socket, one.ctypes.data, 1, 0)
    return count == 1


@part(())
def now() -> Any:
    """Seconds, as `time.monotonic` has them."""
    parts = np.empty(2, np.int64)
    _clock_gettime(_MONOTONIC, parts.ctypes.data)
    return parts[0] + parts[1] * 1e-9
