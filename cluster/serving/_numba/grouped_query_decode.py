"""Grouped-query attention of a decode step as one function, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, types

from cluster.serving._numba.attend import SUMS, attend
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import compile_matmul


@cache
def compile_grouped_query_decode(
    *, heads: int, kv_heads: int, head_dim: int, normed: bool, in_format: str, in_biased: bool, out_format: str, out_biased: bool
) -> Callable[..., None]:
    """Projections, norms of queries and keys where `normed`, rotary embedding (halves), cache, attention, output.

    It runs without the GIL. Arguments, for T rows with one new token each:
        hidden            float32 [T, H]
        into, onto        int64 [3, 1]: addresses of panels, scales and biases of the packed q, k and v (one below the
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
    multiply_in = compile_matmul(in_format, biased=in_biased)
    multiply_out = compile_matmul(out_format, biased=out_biased)
    attend_one = attend(head_dim, head_dim)
    group, half = heads // kv_heads, head_dim // 2

    @njit(nogil=True, fastmath=SUMS)
    def normalise(values, weight, epsilon):  # type: ignore[no-untyped-def]
        squares = np.float32(0)
        for i in range(head_dim):
            squares += values[i] * values[i]
        factor = np.float32(1) / np.sqrt(squares / np.float32(head_dim) + epsilon)
        for i in range(head_dim):
            values[i] = weight[i] * (values[i] * factor)

    @njit(nogil=True)
    def rotate(values, cos, sin):  # type: ignore[no-untyped-def]
        for i in range(half):
            low, high = values[i], values[i + half]
            values[i] = low * cos[i] - high * sin[i]
            values[i + half] = high * cos[i + half] + low * sin[i + half]

    def grouped_query_decode(
        hidden: Any,
        into: Any,
        onto: Any,
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
            *(into[0], into[1], into[2], starts, panels[0], hidden_size),
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
                rotate(parts[head], cos[row], sin[row])
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
            *(onto[0], onto[1], onto[2], starts, panels[1], heads * head_dim),
            *(summed.ctypes.data, heads * head_dim * 4, out.ctypes.data, out.shape[1] * 4),
        )

    matrix, cache_, single = types.float32[:, ::1], types.float32[:, :, :, :, ::1], types.float32
    addresses, whole = types.int64[:, ::1], types.int64
    signature = types.void(
        *(matrix, addresses, addresses, types.int64[::1], types.float32[::1], types.float32[::1], single),
        *(matrix, matrix, cache_, cache_, whole, types.int64[::1], types.int64[::1], whole, single),
        *(matrix, matrix, matrix),
    )
    variant = heads, kv_heads, head_dim, normed, in_format, in_biased, out_format, out_biased
    return compiled(grouped_query_decode, signature, variant=variant, error_model="numpy")
