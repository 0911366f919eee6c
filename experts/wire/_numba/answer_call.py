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
from experts.ops._numba.object_cache import compiled, part
from experts.ops._numba.unpermute import compile_unpermute
from experts.ops.packed_matmul import ROWS_A_READ

# Fields of ForwardRequest, and of a Tensor.
_CALL_ID, _LAYER, _IDS, _OFFSETS, _ROWS, _WEIGHTS, _REPLY_DTYPE, _HIDDEN = 1, 2, 3, 4, 5, 6, 7, 15
_DTYPE, _SHAPE, _DATA = 1, 2, 15
_FLOAT32 = 1
_VARINT, _LENGTH = 0, 2
_TAG_BYTES = 5
_TAG_1, _TAG_2, _TAG_15 = 1 << 3, 2 << 3 | _LENGTH, 15 << 3 | _LENGTH
# The fields of an ordinary call and of its hidden states, a bit each: numbers, and fields that have a length.
_CALL_NUMBERS = 1 << _CALL_ID | 1 << _LAYER | 1 << _REPLY_DTYPE
_CALL_CONTENTS = 1 << _IDS | 1 << _OFFSETS | 1 << _ROWS | 1 << _WEIGHTS | 1 << _HIDDEN
_TENSOR_NUMBERS, _TENSOR_CONTENTS = 1 << _DTYPE, 1 << _SHAPE | 1 << _DATA


@part(())
def _read_varint(message: Any, position: Any, end: Any) -> Any:
    """(value, position after it); (-1, ...) where it is cut off or of more than 56 bits."""
    value, shift = np.int64(0), 0
    while position < end and shift < 56:
        byte = np.int64(message[position])
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    return np.int64(-1), position


@part(())
def _read_fields(message: Any, position: Any, end: Any, numbers: Any, contents: Any, values: Any, ends: Any) -> Any:
    """Numbers, or where contents start, to `values[field]`, where contents end to `ends[field]`.

    False for any other field, one that comes twice, and what is no protobuf; values of absent fields stay.
    """
    seen = np.int64(0)
    while position < end:
        tag, after = _read_varint(message, position, end)
        field = tag >> 3
        if tag < 0 or after - position > _TAG_BYTES or field > 15 or seen >> field & 1:
            return False
        position = after
        seen |= np.int64(1) << field
        value, position = _read_varint(message, position, end)
        if value < 0:
            return False
        values[field] = value
        if tag & 7 == _VARINT and numbers >> field & 1:
            continue
        if tag & 7 != _LENGTH or not contents >> field & 1 or value > end - position:
            return False
        values[field], ends[field] = position, position + value
        position += value
    return True


@part(())
def _copy(message: Any, values: Any, ends: Any, field: Any, out: Any) -> Any:
    """A field's content to the start of `out`; how many values of four bytes, -1 where it is not whole or too long."""
    start, size = values[field], ends[field] - values[field]
    if size % 4 or size > len(out):
        return np.int64(-1)
    for i in range(size):
        out[i] = message[start + i]
    return size // 4


@part(())
def _write_varint(message: Any, position: Any, value: Any) -> Any:
    while value > 0x7F:
        message[position] = value & 0x7F | 0x80
        value >>= 7
        position += 1
    message[position] = value
    return position + 1


@part(())
def _varint_bytes(value: Any) -> Any:
    size = 1
    while value > 0x7F:
        value >>= 7
        size += 1
    return size


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
        if not _read_fields(request, 0, len(request), _CALL_NUMBERS, _CALL_CONTENTS, values, ends):
            return 0
        call_id, layer = values[_CALL_ID], values[_LAYER]
        if values[_REPLY_DTYPE] > _FLOAT32 or layer >= len(experts):
            return 0
        tensor, tensor_ends = np.zeros(16, np.int64), np.zeros(16, np.int64)
        if not _read_fields(
            *(request, values[_HIDDEN], ends[_HIDDEN], _TENSOR_NUMBERS, _TENSOR_CONTENTS, tensor, tensor_ends)
        ):
            return 0
        if tensor[_DTYPE] != _FLOAT32:
            return 0
        num_tokens, position = _read_varint(request, tensor[_SHAPE], tensor_ends[_SHAPE])
        width, position = _read_varint(request, position, tensor_ends[_SHAPE])
        hidden_size = hidden.shape[1]
        if position != tensor_ends[_SHAPE] or width != hidden_size or num_tokens < 1 or num_tokens > len(hidden):
            return 0
        if _copy(request, tensor, tensor_ends, _DATA, hidden.reshape(-1).view(np.uint8)) != num_tokens * width:
            return 0

        num_experts = _copy(request, values, ends, _IDS, ids.view(np.uint8))
        num_rows = _copy(request, values, ends, _ROWS, token_rows.view(np.uint8))
        if num_experts < 1 or num_rows < 1 or num_rows + ROWS_A_READ * num_experts > most_work:
            return 0
        if _copy(request, values, ends, _OFFSETS, offsets.view(np.uint8)) != num_experts + 1:
            return 0
        if _copy(request, values, ends, _WEIGHTS, weights.view(np.uint8)) != num_rows:
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

        data_bytes = num_tokens * hidden_size * 4
        shape_bytes = _varint_bytes(num_tokens) + _varint_bytes(hidden_size)
        tensor_bytes = 2 + 2 + shape_bytes + 1 + _varint_bytes(data_bytes) + data_bytes
        position = 0
        if call_id:
            reply[0] = _TAG_1
            position = _write_varint(reply, 1, call_id)
        reply[position] = _TAG_15
        position = _write_varint(reply, position + 1, tensor_bytes)
        reply[position], reply[position + 1] = _TAG_1, _FLOAT32
        reply[position + 2], reply[position + 3] = _TAG_2, shape_bytes
        position = _write_varint(reply, position + 4, num_tokens)
        position = _write_varint(reply, position, hidden_size)
        reply[position] = _TAG_15
        position = _write_varint(reply, position + 1, data_bytes)
        data = partial.reshape(-1).view(np.uint8)
        for i in range(data_bytes):
            reply[position + i] = data[i]
        return position + data_bytes

    floats, ints, numbers = types.float32[:, ::1], types.int32[::1], types.float32[::1]
    signature = types.int64(
        types.Array(types.uint8, 1, "C", readonly=True),
        *(types.int64[:, :, ::1], types.int64[::1], types.float32, types.float32, types.int64),
        *(*[ints] * 3, numbers, *[floats] * 6, types.uint8[::1], types.int64[::1]),
    )
    variant = activation, gated, biased, up_format, down_format, ROWS_A_READ
    return compiled(answer_call, signature, variant=variant, error_model="numpy")  # type: ignore[return-value]
