"""The C library's sockets, for compiled code.

Between two messages the Python around a socket takes longer than it looks: a core's caches are full of weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from experts.ops._numba.object_cache import part

LENGTH_BYTES = 4
"""Of what is before each message, little-endian."""

_poll = types.ExternalFunction("poll", types.int32(types.intp, types.uint64, types.int32))
recv = types.ExternalFunction("recv", types.intp(types.int32, types.intp, types.uint64, types.int32))
send = types.ExternalFunction("send", types.intp(types.int32, types.intp, types.uint64, types.int32))
_POLLIN = 1
# Neither wait for room nor raise a signal.
_AT_ONCE = 0x40 | 0x4000


@part(())
def send_framed(socket: Any, framed: Any, size: Any) -> Any:
    """Write a message of `size` bytes, which `framed` has from LENGTH_BYTES on, at once; False where it cannot be."""
    for i in range(LENGTH_BYTES):
        framed[i] = size >> (8 * i) & 0xFF
    return send(socket, framed.ctypes.data, LENGTH_BYTES + size, _AT_ONCE) == LENGTH_BYTES + size


@part(())
def receive_framed(socket: Any, framed: Any, have: Any, wait_ms: Any) -> Any:
    """Read on until `framed`, with `have` bytes of it so far, holds one message; (bytes it now has, its end).

    The end is 0 where input took longer than `wait_ms`, and -1 where nothing comes any more, or it is too long.
    """
    wanted = np.zeros(2, np.int32)
    while True:
        size = np.int64(LENGTH_BYTES)
        if have >= LENGTH_BYTES:
            for i in range(LENGTH_BYTES):
                size += np.int64(framed[i]) << (8 * i)
            if have >= size:
                return have, size
        if have == len(framed):
            return have, np.int64(-1)
        wanted[0], wanted[1] = socket, _POLLIN
        ready = _poll(wanted.ctypes.data, 1, wait_ms)
        if ready == 0:
            return have, np.int64(0)
        count = recv(socket, framed.ctypes.data + have, len(framed) - have, 0) if ready > 0 else np.int64(-1)
        if count < 1:
            return have, np.int64(-1)
        have += count
