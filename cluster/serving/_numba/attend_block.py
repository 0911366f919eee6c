"""Softmax attention of a prompt's tokens over their sequence's, a block of queries at a time, for this machine's CPU.

Keys and values lie in panels like a matrix's weights (see `experts.ops._numba.packed_matmul`), so that scores and sums
are products of packed matrices. What a token gets does not depend on the block: others' keys only add zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from experts.ops._numba.object_cache import part
from experts.ops._numba.packed_matmul import compile_matmul
from experts.ops._numba.softmax import softmax
from experts.ops._numba.vectors import PANEL

BLOCK = 24
"""Queries of a block, whole tiles of a product: fewer read keys more often, more compute scores that nobody may see."""


def whole_panels(size: int) -> int:
    """`size`, rounded up to a whole panel."""
    return -(-size // PANEL) * PANEL


@njit(nogil=True)
def pack_key(key, position, panels):  # type: ignore[no-untyped-def]
    """A key [D] into its place in panels [P, D, PANEL]."""
    panel, lane = position // PANEL, position % PANEL
    for i in range(len(key)):
        panels[panel, i, lane] = key[i]


@njit(nogil=True)
def pack_value(value, position, panels):  # type: ignore[no-untyped-def]
    """A value [D] into its place in panels [P, L, PANEL], whose numbers after D are never read as such."""
    for i in range(len(value)):
        panels[i // PANEL, position, i % PANEL] = value[i]


@cache
def attend_block(key_dim: int, value_dim: int) -> Callable[..., None]:
    """A function for others to call, of float32 queries [N, key_dim] of tokens in a row, at most BLOCK; the first's
    position; how many tokens each sees, its own included; keys in panels [P, key_dim, PANEL]; values in such
    [V, L, PANEL]; the scale of the scores; out [N, value_dim]; [BLOCK, P * PANEL] and [BLOCK, V * PANEL] to work in.

    A value that is no number reaches its whole block.
    """
    multiply = compile_matmul("float32", biased=False)

    @part((key_dim, value_dim))
    def attend(queries, position, window, keys, values, scale, out, scores, sums):  # type: ignore[no-untyped-def]
        count = len(queries)
        seen, starts = position + count, np.array([0, count])
        place, nothing = np.zeros(1, np.int64), np.zeros(1, np.int64)
        first = max(0, position + 1 - window) // PANEL
        begin, panels = first * PANEL, (seen + PANEL - 1) // PANEL - first
        place[0] = keys[first:].ctypes.data
        multiply(
            *(place, nothing, nothing, starts, panels, key_dim),
            *(queries.ctypes.data, queries.strides[0], scores.ctypes.data, scores.strides[0]),
        )
        for row in range(count):
            low, high = max(0, position + row + 1 - window) - begin, position + row + 1 - begin
            softmax(scores[row, low:high], scale)
            scores[row, :low] = 0
            scores[row, high : seen - begin] = 0
        for panel in range(len(values)):
            place[0] = values[panel, begin:].ctypes.data
            multiply(
                *(place, nothing, nothing, starts, 1, seen - begin),
                *(scores.ctypes.data, scores.strides[0], sums[:, panel * PANEL :].ctypes.data, sums.strides[0]),
            )
        for row in range(count):
            for i in range(value_dim):
                out[row, i] = sums[row, i]

    compiled: Callable[..., None] = attend
    return compiled
