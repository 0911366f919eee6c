"""Grouped-query attention of a decode step as one function, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from cluster.serving._numba.attend import attend
from cluster.serving._numba.norm_and_rope import normalise, rotate
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import Kind, compile_matmul


@cache
def compile_grouped_query_decode(
    *, heads: int, kv_heads: int, head_dim: int, normed: bool, into: Kind, onto: Kind
) -> Callable[..., None]:
    """Projections, norms of queries and keys where `normed`, rotary embedding (halves), cache, attention, output.

    It runs without the GIL. Arguments, for T rows with one new token each:
        hidden            float32 [T, H]
        first, last       int64 [3, 1]: addresses of panels, scales and biases of the packed q, k and v (one below the
                          other) and of the output projection
        panels            int64 [2]: of either
        query_norm, key_norm  float32 [head_dim], ignored where not `normed`; epsilon
        cos, sin          float32 [T, head_dim]
        keys, values      float32 [layers, slots, kv_heads, C, head_dim]
        layer; slots, positions  int64 [T]: where the new keys and values belong
        window            how many tokens a query sees, its own included
        scale             of the scores
        projected, summed float32 [T, whole panels], [T, heads * head_dim], to work in
        out               float32 [T, whole panels]
    """
    multiply_in, multiply_out = (compile_matmul(name, biased=biased) for name, biased in (into, onto))
    attend_one = attend(head_dim, head_dim)
    rotate_one = rotate("halves", head_dim)
    group = heads // kv_heads

    def grouped_query_decode(
        hidden: Any,
        first: Any,
        last: Any,
        panels: Any,
        query_norm: Any,
        key_norm: Any,
        epsilon: Any,
        cos: Any,
        sin: Any,
        keys: Any,
        values: Any,
        layer: Any,
        slots: Any,
        positions: Any,
        window: Any,
        scale: Any,
        projected: Any,
        summed: Any,
        out: Any,
    ) -> None:
        num_rows, hidden_size = hidden.shape
        starts = np.array([0, num_rows])
        multiply_in(
            *(first[0], first[1], first[2], starts, panels[0], hidden_size),
            *(hidden.ctypes.data, hidden_size * 4, projected.ctypes.data, projected.shape[1] * 4),
        )
        longest = 0
        for row in range(num_rows):
            longest = max(longest, positions[row] + 1)
        scores = np.empty((group, longest), np.float32)
        for row in range(num_rows):
            slot, position = slots[row], positions[row]
            parts = projected[row, : (heads + 2 * kv_heads) * head_dim].reshape(heads + 2 * kv_heads, head_dim)
            for head in range(heads + kv_heads):
                if normed:
                    normalise(parts[head], query_norm if head < heads else key_norm, epsilon)
                rotate_one(parts[head], cos[row], sin[row], parts[head])
            begin, end = max(0, position + 1 - window), position + 1
            sums = summed[row].reshape(heads, head_dim)
            for head in range(kv_heads):
                key, value = keys[layer, slot, head], values[layer, slot, head]
                key[position] = parts[heads + head]
                value[position] = parts[heads + kv_heads + head]
                attend_one(
                    parts[head * group : (head + 1) * group],
                    key[begin:end],
                    value[begin:end],
                    scale,
                    scores,
                    sums[head * group : (head + 1) * group],
                )
        multiply_out(
            *(last[0], last[1], last[2], starts, panels[1], heads * head_dim),
            *(summed.ctypes.data, heads * head_dim * 4, out.ctypes.data, out.shape[1] * 4),
        )

    matrix, cache_, single = types.float32[:, ::1], types.float32[:, :, :, :, ::1], types.float32
    addresses, whole = types.int64[:, ::1], types.int64
    signature = types.void(
        *(matrix, addresses, addresses, types.int64[::1], types.float32[::1], types.float32[::1], single),
        *(matrix, matrix, cache_, cache_, whole, types.int64[::1], types.int64[::1], whole, single),
        *(matrix, matrix, matrix),
    )
    variant = heads, kv_heads, head_dim, normed, into, onto
    return compiled(grouped_query_decode, signature, variant=variant, error_model="numpy")
