"""Ordinary answers of several expert groups of this machine, from their sockets to their sum, as one function.

Between two messages the Python around a socket takes longer than it looks: a core's caches are full of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from experts.ops._numba.object_cache import compiled
from experts.wire._numba.fields import CALL_ID, PARTIAL, read_fields, read_matrix

LENGTH_BYTES = 4
"""Of what is before each message, little-endian."""

# The C library's.
_poll = types.ExternalFunction("poll", types.int32(types.intp, types.uint64, types.int32))
_recv = types.ExternalFunction("recv", types.intp(types.int32, types.intp, types.uint64, types.int32))
_POLLIN = 1


@cache
def compile_add_answers() -> Callable[..., tuple[int, int]]:
    """The compiled sum; it runs without the GIL. Returns how many answers are in it, and how many bytes of another
    message are in `received`: the next one's, where it came only in part, or is no ordinary answer.

    Arguments:
        sockets     int64 [G], of streams that nobody else reads
        call_ids    int64 [G]: whose answer each stream has to bring next
        counts      int64 [G]: how many of the batch's tokens each one's rows are for; -1: all of them
        tokens      int32: which, one behind the other, ascending
        wait_ms     longest wait for input; -1: for ever
        received    uint8, room for a message
        values      float32, room for a message's rows
        out         float32 [T, H], zeros, to which one answer after the other is added
    """

    def add_answers(
        sockets: Any,
        call_ids: Any,
        counts: Any,
        tokens: Any,
        wait_ms: Any,
        received: Any,
        values: Any,
        out: Any,
    ) -> Any:
        num_tokens, hidden_size = out.shape
        fields, ends, shape = np.zeros(16, np.int64), np.zeros(16, np.int64), np.zeros(2, np.int64)
        wanted = np.zeros(2, np.int32)
        first = 0
        for at in range(len(sockets)):
            have, size = 0, np.int64(LENGTH_BYTES)
            while have < size:
                wanted[0], wanted[1] = sockets[at], _POLLIN
                if _poll(wanted.ctypes.data, 1, wait_ms) < 1:
                    return at, have
                count = _recv(sockets[at], received.ctypes.data + have, len(received) - have, 0)
                if count < 1:
                    return at, have
                have += count
                if have >= LENGTH_BYTES:
                    size = np.int64(LENGTH_BYTES)
                    for i in range(LENGTH_BYTES):
                        size += np.int64(received[i]) << (8 * i)
                if have == len(received) and have < size:
                    return at, have
            fields[:], ends[:] = 0, 0
            if have > size or not read_fields(received, LENGTH_BYTES, size, 1 << CALL_ID, 1 << PARTIAL, fields, ends):
                return at, have
            if fields[CALL_ID] != call_ids[at]:
                return at, have
            if not read_matrix(received, fields[PARTIAL], ends[PARTIAL], values, shape):
                return at, have
            rows = num_tokens if counts[at] < 0 else counts[at]
            if shape[0] != rows or shape[1] != hidden_size:
                return at, have
            for row in range(rows):
                token = row if counts[at] < 0 else tokens[first + row]
                for i in range(hidden_size):
                    out[token, i] += values[row * hidden_size + i]
            first += max(0, counts[at])
        return len(sockets), 0

    numbers = types.int64[::1]
    signature = types.UniTuple(types.int64, 2)(
        *(numbers, numbers, numbers, types.int32[::1], types.int32),
        *(types.uint8[::1], types.float32[::1], types.float32[:, ::1]),
    )
    return compiled(add_answers, signature, variant=(), error_model="numpy")  # type: ignore[return-value]
