"""A layer with grouped-query attention, up to its MLP, for a prompt's tokens at once, compiled for this CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from cluster.serving._numba.add_attention import add_attention
from cluster.serving._numba.attend_block import BLOCK, attend_block, pack_key, pack_value, whole_panels
from cluster.serving._numba.grouped_query import COMMON
from cluster.serving._numba.grouped_query_parts import GroupedQueryShape, read_tokens
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import Kind
from experts.ops._numba.vectors import PANEL


@cache
def compile_grouped_query_prompt(shape: GroupedQueryShape, into: Kind, onto: Kind) -> Callable[..., None]:
    """As `compile_grouped_query`, for T tokens of one sequence that follow each other.

    It runs without the GIL. Arguments as there up to `out`, and then:
        packed  float32 [L in whole panels, kv_heads * (head_dim + head_dim in whole panels)]: keys and values of the
                sequence's L positions so far in panels, this part's being the last
        begin   position from which on they are to be packed; others are by the second half
        half    1: up to `packed`, 2: from there, in the same memory; 0: all
    """
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    read, add = read_tokens(shape, into), add_attention(heads * head_dim, onto)
    attend = attend_block(head_dim, head_dim)
    group, value_columns = heads // kv_heads, whole_panels(head_dim)

    def grouped_query_prompt(
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
        packed: Any,
        begin: Any,
        half: Any,
    ) -> None:
        num_rows, length = len(hidden), len(packed)
        flat = packed.reshape(-1)
        of_keys = length * head_dim * kv_heads
        key_panels = flat[:of_keys].reshape(kv_heads, length // PANEL, head_dim, PANEL)
        value_panels = flat[of_keys:].reshape(kv_heads, value_columns // PANEL, length, PANEL)
        if half != 2:
            read(
                *(hidden, mlp_in, layer_norms[0], layer_epsilons[0], head_norms, epsilon, first, panels[0]),
                *(cos, sin, keys, values, slots, positions, projected),
            )
            for head in range(kv_heads):
                for position in range(begin, positions[-1] + 1):
                    pack_key(keys[slots[0], head, position], position, key_panels[head])
                    pack_value(values[slots[0], head, position], position, value_panels[head])
        if half == 1:
            return
        scores, sums = np.empty((BLOCK, length), np.float32), np.empty((BLOCK, value_columns), np.float32)
        for head in range(heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            for row in range(0, num_rows, BLOCK):
                rows = slice(row, min(row + BLOCK, num_rows))
                attend(
                    *(projected[rows, columns], positions[row], window),
                    *(key_panels[head // group], value_panels[head // group], scale),
                    *(summed[rows, columns], scores, sums),
                )
        add(hidden, summed, last, panels[1], out, residual, layer_norms[1], layer_epsilons[1], mlp_in)

    signature = types.void(*COMMON, types.float32[:, ::1], types.int64, types.int64)
    return compiled(grouped_query_prompt, signature, variant=(shape, into, onto), error_model="numpy")
