"""A small call to an expert group, from its message to the answer's, compiled for this machine's CPU as one function.

Python takes longer than a few rows do once their weights have passed through the caches. The messages are
`ForwardRequest` and `ForwardReply` of expert.proto, written as `experts.wire.codec` does. What is not an ordinary call
in float32, every wrong one included, is left to that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from experts.ops._numba.expert_mlp import compile_expert_mlp
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.unpermute import compile_unpermute
from experts.ops.packed_matmul import ROWS_A_READ
from experts.wire._numba.fields import (
    CALL_ID,
    FLOAT32,
    HIDDEN,
    IDS,
    LAYER,
    OFFSETS,
    PARTIAL,
    REPLY_DTYPE,
    ROWS,
    WEIGHTS,
    read_fields,
    read_matrix,
    read_values,
    write_matrix,
    write_number,
)

# The fields of an ordinary call, a bit each: numbers, and fields that have a length.
_NUMBERS = 1 << CALL_ID | 1 << LAYER | 1 << REPLY_DTYPE
_CONTENTS = 1 << IDS | 1 << OFFSETS | 1 << ROWS | 1 << WEIGHTS | 1 << HIDDEN


@cache
def compile_answer_call(
    activation: str, *, gated: bool, biased: bool, up_format: str, down_format: str
) -> Callable[..., int]:
    """The compiled call; it runs without the GIL and returns the answer's bytes, 0 for a call that it leaves alone.

    Arguments:
        request        uint8 [size]
        experts        int64 [L, E, 6]: addresses as `compile_expert_mlp` takes them of each layer's experts, 0: none
        panels, limit, up_shift   as there
        most_work      rows, and ROWS_A_READ for each expert, up to which a call is small
        ids, offsets, token_rows   int32 [m], [m + 1], [m], to work in; weights  float32 [m]
        hidden, rows, up, inner, out, partial   float32 [m, H], [m, H], [m, whole panels], [m, I], [m, whole panels],
                       [m, H], to work in; calls of more than m rows, experts or tokens are left alone
        reply          uint8, room for a float32 answer and 64 bytes
        counted        int64 [1], gets the number of rows
    """
    run = compile_expert_mlp(activation, gated=gated, biased=biased, up_format=up_format, down_format=down_format)
    unpermute = compile_unpermute()

    def answer_call(
        request: Any,
        experts: Any,
        panels: Any,
        limit: Any,
        up_shift: Any,
        most_work: Any,
        ids: Any,
        offsets: Any,
        token_rows: Any,
        weights: Any,
        hidden: Any,
        rows: Any,
        up: Any,
        inner: Any,
        out: Any,
        partial: Any,
        reply: Any,
        counted: Any,
    ) -> Any:
        # An absent field is 0, or empty.
        values, ends = np.zeros(16, np.int64), np.zeros(16, np.int64)
        if not read_fields(request, 0, len(request), _NUMBERS, _CONTENTS, values, ends):
            return 0
        call_id, layer = values[CALL_ID], values[LAYER]
        if values[REPLY_DTYPE] > FLOAT32 or layer >= len(experts):
            return 0
        shape = np.empty(2, np.int64)
        if not read_matrix(request, values[HIDDEN], ends[HIDDEN], hidden.reshape(-1), shape):
            return 0
        num_tokens = shape[0]
        if shape[1] != hidden.shape[1]:
            return 0
        num_experts = read_values(request, values, ends, IDS, ids)
        num_rows = read_values(request, values, ends, ROWS, token_rows)
        if num_experts < 1 or num_rows < 1 or num_rows + ROWS_A_READ * num_experts > most_work:
            return 0
        if read_values(request, values, ends, OFFSETS, offsets) != num_experts + 1:
            return 0
        if read_values(request, values, ends, WEIGHTS, weights) != num_rows:
            return 0
        if offsets[0] != 0 or offsets[num_experts] != num_rows:
            return 0
        addresses, starts = np.empty((6, num_experts), np.int64), np.empty(num_experts + 1, np.int64)
        starts[num_experts] = num_rows
        last = np.int64(-1)
        for i in range(num_experts):
            expert = ids[i]
            if expert <= last or expert >= experts.shape[1] or offsets[i] > offsets[i + 1]:
                return 0
            last = expert
            if experts[layer, expert, 0] == 0:
                return 0
            for each in range(6):
                addresses[each, i] = experts[layer, expert, each]
            starts[i] = offsets[i]
        for i in range(num_rows):
            if token_rows[i] < 0 or token_rows[i] >= num_tokens:
                return 0

        counted[0] = num_rows
        run(
            *(addresses, panels, starts, hidden, token_rows, limit, up_shift),
            *(rows[:num_rows], up[:num_rows], inner[:num_rows], out),
        )
        partial[:num_tokens] = 0
        unpermute(out, token_rows[:num_rows], weights, partial)

        return write_matrix(reply, write_number(reply, 0, CALL_ID, call_id), PARTIAL, partial[:num_tokens], ids[:0])

    floats, ints, numbers = types.float32[:, ::1], types.int32[::1], types.float32[::1]
    signature = types.int64(
        types.Array(types.uint8, 1, "C", readonly=True),
        *(types.int64[:, :, ::1], types.int64[::1], types.float32, types.float32, types.int64),
        *(*[ints] * 3, numbers, *[floats] * 6, types.uint8[::1], types.int64[::1]),
    )
    variant = activation, gated, biased, up_format, down_format, ROWS_A_READ
    return compiled(answer_call, signature, variant=variant, error_model="numpy")  # type: ignore[return-value]
