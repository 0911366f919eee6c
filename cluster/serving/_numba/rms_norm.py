"""Root-mean-square normalisation of rows, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from cluster.serving._numba.norm_and_rope import normalise_rows
from experts.ops._numba.object_cache import compiled


@cache
def compile_rms_norm() -> Callable[..., None]:
    """The compiled `weight * x / sqrt(mean(x^2) + epsilon)`; it runs without the GIL.

    Arguments: float32 [T, H] rows, [H] weight, epsilon, [T, H] out.
    """

    def rms_norm(rows: Any, weight: Any, epsilon: Any, out: Any) -> None:
        normalise_rows(rows, weight, epsilon, out)

    matrix = types.float32[:, ::1]
    signature = types.void(matrix, types.float32[::1], types.float32, matrix)
    return compiled(rms_norm, signature, variant=(), error_model="numpy")
