"""Fields of the messages of expert.proto, read and written by compiled code as protobuf's own classes do."""

from __future__ import annotations

from typing import Any

import numpy as np

from experts.ops._numba.copy_bytes import copy_bytes
from experts.ops._numba.object_cache import part

# Fields of ForwardRequest, of ForwardReply, and of a Tensor.
CALL_ID, LAYER, IDS, OFFSETS, ROWS, WEIGHTS, REPLY_DTYPE, HIDDEN = 1, 2, 3, 4, 5, 6, 7, 15
PARTIAL = 15
DTYPE, SHAPE, DATA = 1, 2, 15
FLOAT32 = 1
_VARINT, _LENGTH = 0, 2
_TAG_BYTES = 5
# The fields of an ordinary tensor, a bit each: numbers, and fields that have a length.
_TENSOR_NUMBERS, _TENSOR_CONTENTS = 1 << DTYPE, 1 << SHAPE | 1 << DATA


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
def read_fields(message: Any, position: Any, end: Any, numbers: Any, contents: Any, values: Any, ends: Any) -> Any:
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
def read_matrix(message: Any, position: Any, end: Any, out: Any, shape: Any) -> Any:
    """A float32 Tensor [T, H] to the start of float32 `out`, and to `shape`; False for another, and an empty one."""
    values, ends = np.zeros(16, np.int64), np.zeros(16, np.int64)
    if not read_fields(message, position, end, _TENSOR_NUMBERS, _TENSOR_CONTENTS, values, ends):
        return False
    shape[0], after = _read_varint(message, values[SHAPE], ends[SHAPE])
    shape[1], after = _read_varint(message, after, ends[SHAPE])
    # Sizes that do not fit `out` need not be multiplied.
    if after != ends[SHAPE] or min(shape[0], shape[1]) < 1 or max(shape[0], shape[1]) > len(out):
        return False
    return values[DTYPE] == FLOAT32 and read_values(message, values, ends, DATA, out) == shape[0] * shape[1]


@part(())
def read_values(message: Any, values: Any, ends: Any, field: Any, out: Any) -> Any:
    """A content to the start of `out`, of four-byte values; how many, -1 where they are not whole or too many."""
    size = ends[field] - values[field]
    if size % 4 or size > len(out) * 4:
        return np.int64(-1)
    copy_bytes(out.ctypes.data, message.ctypes.data + values[field], size)
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


@part(())
def write_number(message: Any, position: Any, field: Any, value: Any) -> Any:
    """A number, which is not written where it is 0; the position after it, as all of these return."""
    if value == 0:
        return position
    message[position] = field << 3 | _VARINT
    return _write_varint(message, position + 1, value)


@part(())
def write_values(message: Any, position: Any, field: Any, values: Any) -> Any:
    """Values of four bytes, which are not written where there are none."""
    size = len(values) * 4
    if size == 0:
        return position
    message[position] = field << 3 | _LENGTH
    position = _write_varint(message, position + 1, size)
    copy_bytes(message.ctypes.data + position, values.ctypes.data, size)
    return position + size


@part(())
def write_matrix(message: Any, position: Any, field: Any, rows: Any, chosen: Any) -> Any:
    """A Tensor of float32 rows [T, H], T and H at least 1: all rows, or the `chosen` where there are any."""
    num_rows, row_bytes = len(chosen) or len(rows), rows.shape[1] * 4
    data_bytes = num_rows * row_bytes
    shape_bytes = _varint_bytes(num_rows) + _varint_bytes(rows.shape[1])
    message[position] = field << 3 | _LENGTH
    tensor_bytes = 2 + 2 + shape_bytes + 1 + _varint_bytes(data_bytes) + data_bytes
    position = _write_varint(message, position + 1, tensor_bytes)
    position = write_number(message, position, DTYPE, FLOAT32)
    message[position], message[position + 1] = SHAPE << 3 | _LENGTH, shape_bytes
    position = _write_varint(message, position + 2, num_rows)
    position = _write_varint(message, position, rows.shape[1])
    message[position] = DATA << 3 | _LENGTH
    position = _write_varint(message, position + 1, data_bytes)
    if len(chosen):
        for i in range(num_rows):
            copy_bytes(
                message.ctypes.data + position + i * row_bytes, rows.ctypes.data + chosen[i] * row_bytes, row_bytes
            )
    else:
        copy_bytes(message.ctypes.data + position, rows.ctypes.data, data_bytes)
    return position + data_bytes
