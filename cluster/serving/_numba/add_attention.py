"""What follows a layer's attention, as a function for others to call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from cluster.serving._numba.norm_and_rope import add_rows, normalise_rows
from experts.ops._numba.object_cache import part
from experts.ops._numba.packed_matmul import Kind, compile_matmul


@cache
def add_attention(values_dim: int, onto_kind: Kind) -> Callable[..., None]:
    """Output projection of `values` [T, values_dim], residual, norm; see `compile_latent`."""
    onto = compile_matmul(onto_kind[0], biased=onto_kind[1])

    @part((values_dim, onto_kind))
    def add(hidden, values, matrix, panels, out, residual, layer_norm, layer_epsilon, mlp_in):  # type: ignore[no-untyped-def]
        starts = np.array([0, hidden.shape[0]])
        onto(
            *(matrix[0, :1], matrix[1, :1], matrix[2, :1], starts, panels, values_dim),
            *(values.ctypes.data, values_dim * 4, out.ctypes.data, out.shape[1] * 4),
        )
        add_rows(hidden, out, residual)
        normalise_rows(residual, layer_norm, layer_epsilon, mlp_in)

    compiled: Callable[..., None] = add
    return compiled
