"""Ordinary answers of several expert groups of this machine, from their sockets to their sum, as one function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from experts.ops._numba.object_cache import compiled
from experts.wire._numba.fields import CALL_ID, PARTIAL, read_fields, read_matrix
from experts.wire._numba.sockets import LENGTH_BYTES, receive_framed

SUMMED, LATE, OTHER = 0, 1, 2
"""All answers are in the sum; an answer took too long, ask again; what came is no ordinary answer."""


@cache
def compile_add_answers() -> Callable[..., int]:
    """The compiled sum, which returns how it ended; it runs without the GIL.

    Arguments:
        sockets     int64 [G], of streams that nobody else reads
        call_id     whose answer each stream has to bring next
        shares      int64 [G, 3], tokens int32: see `compile_split_rows`; which rows of `out` an answer's are for
        progress    int64 [2], zeros at first: groups in the sum, and bytes of the next one's answer in `received`
        wait_ms     longest wait for input
        received    uint8, room for a message
        values      float32, room for a message's rows
        out         float32 [T, H], gets the sum: the answers one after the other, added to zeros
    """

    def add_answers(
        sockets: Any,
        call_id: Any,
        shares: Any,
        tokens: Any,
        progress: Any,
        wait_ms: Any,
        received: Any,
        values: Any,
        out: Any,
    ) -> Any:
        num_tokens, hidden_size = out.shape
        fields, ends, shape = np.zeros(16, np.int64), np.zeros(16, np.int64), np.zeros(2, np.int64)
        if progress[0] == 0:
            out[:] = 0
        first = 0
        for at in range(len(sockets)):
            chosen = shares[at, 2]
            if shares[at, 0] == 0 or at < progress[0]:
                first += chosen
                continue
            progress[0] = at
            progress[1], size = receive_framed(sockets[at], received, progress[1], wait_ms)
            if size == 0:
                return LATE
            fields[:], ends[:] = 0, 0
            if progress[1] != size or not read_fields(
                received, LENGTH_BYTES, size, 1 << CALL_ID, 1 << PARTIAL, fields, ends
            ):
                return OTHER
            if fields[CALL_ID] != call_id or not read_matrix(received, fields[PARTIAL], ends[PARTIAL], values, shape):
                return OTHER
            rows = chosen if chosen else num_tokens
            if shape[0] != rows or shape[1] != hidden_size:
                return OTHER
            for row in range(rows):
                token = tokens[first + row] if chosen else row
                for i in range(hidden_size):
                    out[token, i] += values[row * hidden_size + i]
            first += chosen
            progress[0], progress[1] = at + 1, 0
        return SUMMED

    numbers, whole = types.int64[::1], types.int64
    signature = whole(
        *(numbers, whole, types.int64[:, ::1], types.int32[::1], numbers, types.int32),
        *(types.uint8[::1], types.float32[::1], types.float32[:, ::1]),
    )
    return compiled(add_answers, signature, variant=(), error_model="numpy")  # type: ignore[return-value]
