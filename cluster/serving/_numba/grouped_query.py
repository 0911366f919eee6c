"""A layer with grouped-query attention, up to its MLP, token by token, as one function compiled for this CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from cluster.serving._numba.attend import attend
from cluster.serving._numba.norm_and_rope import add_rows, normalise, normalise_rows, rotate
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import Kind, compile_matmul


@cache
def compile_grouped_query(
    *, heads: int, kv_heads: int, head_dim: int, normed: bool, into: Kind, onto: Kind
) -> Callable[..., None]:
    """Norm, projections, norms of queries and keys where `normed`, rotary embedding (halves), cache, attention, output
    projection, residual, norm.

    It runs without the GIL. Arguments, for T rows with one new token each:
        hidden            float32 [T, H]
        residual, mlp_in  float32 [T, H], written: `hidden` and its attention; the norm of that
        layer_norms       float32 [2, H]: weights of the norms before attention and after
        layer_epsilons    float32 [2]: theirs
        head_norms        float32 [2, head_dim]: of queries and of keys, ignored where not `normed`; their epsilon
        first, last       int64 [3, 1]: addresses of panels, scales and biases of the packed q, k and v (one below the
                          other) and of the output projection
        panels            int64 [2]: of either
        layer             where in the cache
        window            how many tokens a query sees, its own included
        scale             of the scores
        cos, sin          float32 [T, head_dim]
        keys, values      float32 [layers, slots, kv_heads, C, head_dim]
        slots, positions  int64 [T]: where the new keys and values belong
        projected, summed, out  float32 [T, whole panels], [T, heads * head_dim], [T, whole panels], to work in
        half              1: up to the cache, 2: from there, in the same memory; 0: all
    """
    multiply_in, multiply_out = (compile_matmul(name, biased=biased) for name, biased in (into, onto))
    attend_one = attend(head_dim, head_dim)
    rotate_one = rotate("halves", head_dim)
    group = heads // kv_heads

    def grouped_query(
        hidden: Any,
        residual: Any,
        mlp_in: Any,
        layer_norms: Any,
        layer_epsilons: Any,
        head_norms: Any,
        epsilon: Any,
        first: Any,
        last: Any,
        panels: Any,
        layer: Any,
        window: Any,
        scale: Any,
        cos: Any,
        sin: Any,
        keys: Any,
        values: Any,
        slots: Any,
        positions: Any,
        projected: Any,
        summed: Any,
        out: Any,
        half: Any,
    ) -> None:
        num_rows, hidden_size = hidden.shape
        starts = np.array([0, num_rows])
        if half != 2:
            normalise_rows(hidden, layer_norms[0], layer_epsilons[0], mlp_in)
            multiply_in(
                *(first[0], first[1], first[2], starts, panels[0], hidden_size),
                *(mlp_in.ctypes.data, hidden_size * 4, projected.ctypes.data, projected.shape[1] * 4),
            )
        longest = 0
        for row in range(num_rows):
            longest = max(longest, positions[row] + 1)
        scores = np.empty((group, longest), np.float32)
        for row in range(num_rows):
            slot, position = slots[row], positions[row]
            parts = projected[row, : (heads + 2 * kv_heads) * head_dim].reshape(heads + 2 * kv_heads, head_dim)
            sums = summed[row].reshape(heads, head_dim)
            if half != 2:
                for head in range(heads + kv_heads):
                    if normed:
                        normalise(parts[head], head_norms[0 if head < heads else 1], epsilon)
                    rotate_one(parts[head], cos[row], sin[row], parts[head])
                for head in range(kv_heads):
                    keys[layer, slot, head, position] = parts[heads + head]
                    values[layer, slot, head, position] = parts[heads + kv_heads + head]
            if half != 1:
                begin, end = max(0, position + 1 - window), position + 1
                for head in range(kv_heads):
                    attend_one(
                        parts[head * group : (head + 1) * group],
                        keys[layer, slot, head, begin:end],
                        values[layer, slot, head, begin:end],
                        scale,
                        scores,
                        sums[head * group : (head + 1) * group],
                    )
        if half == 1:
            return
        multiply_out(
            *(last[0], last[1], last[2], starts, panels[1], heads * head_dim),
            *(summed.ctypes.data, heads * head_dim * 4, out.ctypes.data, out.shape[1] * 4),
        )
        add_rows(hidden, out, residual)
        normalise_rows(residual, layer_norms[1], layer_epsilons[1], mlp_in)

    matrix, cache_, vector = types.float32[:, ::1], types.float32[:, :, :, :, ::1], types.float32[::1]
    addresses, numbers, whole, single = types.int64[:, ::1], types.int64[::1], types.int64, types.float32
    signature = types.void(
        *(matrix, matrix, matrix, matrix, vector, matrix, single),
        *(addresses, addresses, numbers, whole, whole, single),
        *(matrix, matrix, cache_, cache_, numbers, numbers, matrix, matrix, matrix, whole),
    )
    variant = heads, kv_heads, head_dim, normed, into, onto
    return compiled(grouped_query, signature, variant=variant, error_model="numpy")
