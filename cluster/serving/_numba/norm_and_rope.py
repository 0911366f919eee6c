"""What happens to rows, or to their parts, between products, as functions for others to call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

import numpy as np
from numba import njit

from experts.ops._numba.object_cache import SUMS, part

Rope = Literal["halves", "pairs", "pairs_to_halves"]


@njit(nogil=True, fastmath=SUMS)
def normalise(values, weight, epsilon):  # type: ignore[no-untyped-def]
    """`weight * x / sqrt(mean(x^2) + epsilon)` in place; float32 [N] both."""
    squares = np.float32(0)
    for i in range(len(weight)):
        squares += values[i] * values[i]
    factor = np.float32(1) / np.sqrt(squares / np.float32(len(weight)) + epsilon)
    for i in range(len(weight)):
        values[i] = weight[i] * (values[i] * factor)


@njit(nogil=True)
def copy_values(values, out):  # type: ignore[no-untyped-def]
    """Float32 [N] into the first of `out`: an assignment to a slice brings its error's text, seconds to compile."""
    for i in range(len(values)):
        out[i] = values[i]


@njit(nogil=True)
def normalise_rows(rows, weight, epsilon, out):  # type: ignore[no-untyped-def]
    """`normalise` of every row: float32 [T, N] into [T, N]."""
    for row in range(rows.shape[0]):
        copy_values(rows[row], out[row])
        normalise(out[row], weight, epsilon)


@njit(nogil=True)
def add_rows(rows, others, out):  # type: ignore[no-untyped-def]
    """Sums of float32 [T, N] and the first N columns of `others` into out [T, N]."""
    for row in range(rows.shape[0]):
        for i in range(rows.shape[1]):
            out[row, i] = rows[row, i] + others[row, i]


@cache
def rotate(rope: Rope, dim: int) -> Callable[..., None]:
    """Rotary embedding of values [dim] into out [dim], cos and sin [at least dim / 2] of the position.

    halves:          numbers i and i + dim / 2 are a pair
    pairs:           2i and 2i + 1 are
    pairs_to_halves: the same, and the rotated pair goes to i and i + dim / 2
    """
    half = dim // 2
    from_pairs, to_pairs = rope != "halves", rope == "pairs"

    @part((rope, dim))
    def rotate_one(values, cos, sin, out):  # type: ignore[no-untyped-def]
        for i in range(half):
            low, high = (values[2 * i], values[2 * i + 1]) if from_pairs else (values[i], values[i + half])
            turned, risen = low * cos[i] - high * sin[i], high * cos[i] + low * sin[i]
            if to_pairs:
                out[2 * i], out[2 * i + 1] = turned, risen
            else:
                out[i], out[i + half] = turned, risen

    compiled: Callable[..., None] = rotate_one
    return compiled
