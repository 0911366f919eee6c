"""An ordinary call to an expert group as a message, compiled for this machine's CPU as one function.

The message is a `ForwardRequest` of expert.proto, byte for byte what `experts.wire.codec` writes without this.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from experts.ops._numba.object_cache import compiled
from experts.wire._numba.fields import (
    CALL_ID,
    FLOAT32,
    HIDDEN,
    IDS,
    LAYER,
    OFFSETS,
    REPLY_DTYPE,
    ROWS,
    WEIGHTS,
    write_matrix,
    write_number,
    write_values,
)


@cache
def compile_write_call() -> Callable[..., int]:
    """The compiled writer, which returns the message's bytes; it runs without the GIL.

    Arguments: call_id, layer; hidden float32 [T, H], neither 0; tokens int32, the rows of it that are meant, below T,
    none: all; ids, offsets, token_rows int32, weights float32, as in `experts.spec.ExpertCall`; message uint8, room for
    them all and 128 bytes.
    """

    def write_call(
        call_id: Any,
        layer: Any,
        hidden: Any,
        tokens: Any,
        ids: Any,
        offsets: Any,
        token_rows: Any,
        weights: Any,
        message: Any,
    ) -> Any:
        position = write_number(message, 0, CALL_ID, call_id)
        position = write_number(message, position, LAYER, layer)
        position = write_values(message, position, IDS, ids)
        position = write_values(message, position, OFFSETS, offsets)
        position = write_values(message, position, ROWS, token_rows)
        position = write_values(message, position, WEIGHTS, weights)
        position = write_number(message, position, REPLY_DTYPE, FLOAT32)
        return write_matrix(message, position, HIDDEN, hidden, tokens)

    ints = types.int32[::1]
    signature = types.int64(
        *(types.int64, types.int64, types.float32[:, ::1], ints, ints, ints, ints),
        *(types.float32[::1], types.uint8[::1]),
    )
    return compiled(write_call, signature, variant=())  # type: ignore[return-value]
