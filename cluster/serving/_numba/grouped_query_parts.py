"""What all tokens of a layer with grouped-query attention go through before it, as a function for others to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from cluster.serving._numba.norm_and_rope import copy_values, normalise, normalise_rows, rotate
from experts.ops._numba.object_cache import part
from experts.ops._numba.packed_matmul import Kind, compile_matmul


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedQueryShape:
    """normed: whether queries and keys have norms of their own."""

    heads: int
    kv_heads: int
    head_dim: int
    normed: bool


@cache
def read_tokens(shape: GroupedQueryShape, into_kind: Kind) -> Callable[..., None]:
    """Norm, projections, norms of queries and keys, rotary embedding, cache; see `compile_grouped_query`."""
    into = compile_matmul(into_kind[0], biased=into_kind[1])
    heads, kv_heads, head_dim, normed = shape.heads, shape.kv_heads, shape.head_dim, shape.normed
    rotate_one = rotate("halves", head_dim)

    @part((shape, into_kind))
    def read(  # type: ignore[no-untyped-def]
        hidden,
        normalised,
        layer_norm,
        layer_epsilon,
        head_norms,
        epsilon,
        matrix,
        panels,
        cos,
        sin,
        keys,
        values,
        slots,
        positions,
        projected,
    ):
        num_rows, hidden_size = hidden.shape
        starts = np.array([0, num_rows])
        normalise_rows(hidden, layer_norm, layer_epsilon, normalised)
        into(
            *(matrix[0], matrix[1], matrix[2], starts, panels, hidden_size),
            *(normalised.ctypes.data, hidden_size * 4, projected.ctypes.data, projected.shape[1] * 4),
        )
        for row in range(num_rows):
            slot, position = slots[row], positions[row]
            parts = projected[row, : (heads + 2 * kv_heads) * head_dim].reshape(heads + 2 * kv_heads, head_dim)
            for head in range(heads + kv_heads):
                if normed:
                    normalise(parts[head], head_norms[0 if head < heads else 1], epsilon)
                rotate_one(parts[head], cos[row], sin[row], parts[head])
            for head in range(kv_heads):
                copy_values(parts[heads + head], keys[slot, head, position])
                copy_values(parts[heads + kv_heads + head], values[slot, head, position])

    compiled: Callable[..., None] = read
    return compiled
