"""An ordinary answer of an expert group, read from its message by compiled code.

The message is a `ForwardReply` of expert.proto. What is no answer in float32 is left to `experts.wire.codec`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from experts.ops._numba.object_cache import compiled
from experts.wire._numba.fields import CALL_ID, PARTIAL, read_fields, read_matrix


@cache
def compile_read_partial() -> Callable[..., bool]:
    """The compiled reader; it runs without the GIL and returns whether it knows the message.

    Arguments: message uint8 [size]; out float32 [size / 4], whose first T * H it fills; numbers int64 [3], which get
    call_id, T and H.
    """

    def read_partial(message: Any, out: Any, numbers: Any) -> Any:
        # An absent field is 0, or empty.
        values, ends = np.zeros(16, np.int64), np.zeros(16, np.int64)
        if not read_fields(message, 0, len(message), 1 << CALL_ID, 1 << PARTIAL, values, ends):
            return False
        numbers[0] = values[CALL_ID]
        return read_matrix(message, values[PARTIAL], ends[PARTIAL], out, numbers[1:])

    message = types.Array(types.uint8, 1, "C", readonly=True)
    signature = types.boolean(message, types.float32[::1], types.int64[::1])
    return compiled(read_partial, signature, variant=())  # type: ignore[return-value]
