"""A layer with grouped-query attention, up to its MLP, token by token, as one function compiled for this CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

from cluster.serving._numba.add_attention import add_attention
from cluster.serving._numba.attend import attend
from cluster.serving._numba.grouped_query_parts import GroupedQueryShape, read_tokens
from experts.ops._numba.call import caller_of
from experts.ops._numba.memory import memory
from experts.ops._numba.object_cache import compiled, part
from experts.ops._numba.packed_matmul import Kind

_MATRIX, _CACHE, _VECTOR = types.float32[:, ::1], types.float32[:, :, :, ::1], types.float32[::1]
_ADDRESSES, _NUMBERS = types.int64[:, ::1], types.int64[::1]
COMMON = (
    *(_MATRIX, _MATRIX, _MATRIX, _MATRIX, _VECTOR, _MATRIX, types.float32),
    *(_ADDRESSES, _ADDRESSES, _NUMBERS, types.int64, types.float32),
    *(_MATRIX, _MATRIX, _CACHE, _CACHE, _NUMBERS, _NUMBERS, _MATRIX, _MATRIX, _MATRIX),
)
"""Types of the arguments up to `out`."""


@cache
def compile_grouped_query(shape: GroupedQueryShape, into: Kind, onto: Kind) -> Callable[..., None]:
    """Norm, projections, norms of queries and keys where there are, rotary embedding (halves), cache, attention, output
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
        window            how many tokens a query sees, its own included
        scale             of the scores
        cos, sin          float32 [T, head_dim]
        keys, values      float32 [slots, kv_heads, C, head_dim], the layer's cache
        slots, positions  int64 [T]: where the new keys and values belong
        projected, summed, out  float32 [T, whole panels], [T, heads * head_dim], [T, whole panels], to work in
        half              1: up to the cache, 2: from there, in the same memory; 0: all
    """
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    read, add = read_tokens(shape, into), add_attention(heads * head_dim, onto)
    attend_one = attend(head_dim, head_dim)
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
        if half != 2:
            read(
                *(hidden, mlp_in, layer_norms[0], layer_epsilons[0], head_norms, epsilon, first, panels[0]),
                *(cos, sin, keys, values, slots, positions, projected),
            )
        if half == 1:
            return
        num_rows = hidden.shape[0]
        longest = 0
        for row in range(num_rows):
            longest = max(longest, positions[row] + 1)
        scores = np.empty((group, longest), np.float32)
        for row in range(num_rows):
            slot, end = slots[row], positions[row] + 1
            begin = max(0, end - window)
            queries, sums = (
                projected[row, : heads * head_dim].reshape(heads, head_dim),
                summed[row].reshape(heads, head_dim),
            )
            for head in range(kv_heads):
                grouped = slice(head * group, (head + 1) * group)
                seen = keys[slot, head, begin:end], values[slot, head, begin:end]
                attend_one(queries[grouped], seen[0], seen[1], scale, scores, sums[grouped])
        add(hidden, summed, last, panels[1], out, residual, layer_norms[1], layer_epsilons[1], mlp_in)

    signature = types.void(*COMMON, types.int64)
    return compiled(grouped_query, signature, variant=(shape, into, onto), error_model="numpy")


CONSTANTS = types.Tuple(
    (
        *(types.float32[:, :, ::1], _MATRIX, types.float32[:, :, ::1], _VECTOR),
        *(types.int64[:, :, ::1], types.int64[:, :, ::1], _ADDRESSES, _NUMBERS, _VECTOR),
    )
)
WORK = types.UniTuple(_MATRIX, 3)


@cache
def attend_rows(shape: GroupedQueryShape, into: Kind, onto: Kind) -> Callable[..., None]:
    """One of several layers for some rows of a step, as a function for others to call; see `compile_decode_layers`.

    address:   of what `compile_grouped_query` makes
    constants: its arguments from `layer_norms` to `scale`, each with a number for every layer (CONSTANTS)
    caches:    addresses of the layer's keys and values, how many slots there are, and C
    work:      what is to work in there, for all rows of the step (WORK)
    """
    call = caller_of(compile_grouped_query(shape, into, onto))
    kv_heads, head_dim = shape.kv_heads, shape.head_dim

    @part((kv_heads, head_dim))
    def attend(address, number, rows, hidden, residual, mlp_in, constants, cos, sin, caches, slots, positions, work):  # type: ignore[no-untyped-def]
        size = (caches[2], kv_heads, caches[3], head_dim)
        arguments = (
            hidden[rows], residual[rows], mlp_in[rows], constants[0][number], constants[1][number],
            constants[2][number], constants[3][number], constants[4][number], constants[5][number],
            constants[6][number], constants[7][number], constants[8][number], cos[rows], sin[rows],
            numba.carray(memory(caches[0]), size, np.float32),
            numba.carray(memory(caches[1]), size, np.float32), slots[rows], positions[rows], work[0][rows],
            work[1][rows], work[2][rows], 0,
        )  # fmt: skip
        call(address, arguments)

    function: Callable[..., None] = attend
    return function
