"""Experts' rows back to their tokens, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from experts.ops._numba.object_cache import compiled


def compile_unpermute() -> Callable[..., None]:
    """The compiled sum; it runs without the GIL.

    Arguments: float32 [R, at least H] rows, int32 [R] each one's token, float32 [R] its weight, float32 [T, H] zeros.
    """

    def unpermute(rows: Any, tokens: Any, weights: Any, partial: Any) -> None:
        for row in range(len(tokens)):
            weight, values, total = weights[row], rows[row], partial[tokens[row]]
            for column in range(len(total)):
                total[column] += weight * values[column]

    matrix = types.float32[:, ::1]
    signature = types.void(matrix, types.int32[:], types.float32[:], matrix)
    return compiled(unpermute, signature, variant=())
