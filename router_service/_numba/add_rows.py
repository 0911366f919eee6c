"""Some rows added to others, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from experts.ops._numba.object_cache import compiled


@cache
def compile_add_rows() -> Callable[..., None]:
    """The compiled sum; it runs without the GIL.

    Arguments: float32 [T, H] sums, int32 [R] which of their rows, below T, float32 [R, H] what is added to each.
    """

    def add_rows(sums: Any, tokens: Any, partial: Any) -> None:
        for row in range(len(tokens)):
            total, values = sums[tokens[row]], partial[row]
            for column in range(len(values)):
                total[column] += values[column]

    matrix = types.float32[:, ::1]
    return compiled(add_rows, types.void(matrix, types.int32[::1], matrix), variant=())
