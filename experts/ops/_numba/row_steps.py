"""A float32 row as whole steps of its largest value, for products of integers.

16 bits a value: 3e-5 of a result, where rounding weights to int8 has cost a hundred times that.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from experts.ops._numba.memory import memory
from experts.ops._numba.object_cache import SUMS, part

HEAD_BYTES = 64
"""What is before a row's steps: what one is worth, float32, and room for eight bytes of the product's own."""
# The largest value of a row in steps: a high byte, signed, times 256.
_MOST_STEPS = np.float32(127 << 8)
# Rows of nothing above so many steps are zeros.
_LEAST_STEP = np.float32(1e-36)
_ZERO, _HALF = np.float32(0), np.float32(0.5)


@part((), fastmath=SUMS, error_model="numpy")
def write_step(row: Any, inputs: Any, head: Any) -> Any:
    """Writes to an address what a step of the row at another is worth; returns how many steps 1 is."""
    bits = numba.carray(memory(row), inputs, np.int32)
    largest = np.int32(0)
    for i in range(inputs):
        # Without its sign, a float's bits are in its order.
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    numba.carray(memory(head), 1, np.int32)[0] = largest
    worth = numba.carray(memory(head), 1, np.float32)
    step = worth[0] / _MOST_STEPS
    worth[0] = step
    return np.float32(1) / step if step > _LEAST_STEP else np.float32(0)


@part((), fastmath=SUMS)
def whole_steps(value: Any, steps: Any) -> Any:
    """A value in steps, rounded."""
    scaled = value * steps
    return np.int32(scaled + (_HALF if scaled > _ZERO else -_HALF))
