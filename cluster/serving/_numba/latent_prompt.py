"""A layer with latent attention, up to its MLP, for a prompt's tokens at once, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from cluster.serving._numba.add_attention import add_attention
from cluster.serving._numba.attend_block import BLOCK, attend_block, pack_key, pack_value, whole_panels
from cluster.serving._numba.latent import COMMON
from cluster.serving._numba.latent_parts import LatentShape, read_tokens
from cluster.serving._numba.norm_and_rope import copy_values, rotate
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import Kind, compile_matmul
from experts.ops._numba.vectors import PANEL


@cache
def compile_latent_prompt(shape: LatentShape, kinds: tuple[Kind, ...]) -> Callable[..., None]:
    """As `compile_latent`, for T tokens of one sequence that follow each other, with keys and values expanded.

    It runs without the GIL. Arguments as there up to `out`, and instead of the last three:
        pairs   float32 [at least L, whole panels]: keys, without their rotary parts, and values of the sequence's L
                positions so far, this part's being the last
        begin   position from which on they are to be expanded; others are by then, or by the second half
        half    1: up to `pairs`, 2: from there, in the same memory; 0: all
    """
    read, add = read_tokens(shape, *kinds[:2]), add_attention(shape.heads * shape.value_dim, kinds[4])
    expand = compile_matmul(kinds[5][0], biased=kinds[5][1])
    heads, nope, rope_dim, rank, value_dim = shape.heads, shape.nope, shape.rope_dim, shape.rank, shape.value_dim
    query_dim, row_dim, query_rank = shape.query_dim, shape.row_dim, shape.query_rank
    value_columns = whole_panels(value_dim)
    attend, rotate_one = attend_block(query_dim, value_dim), rotate(shape.rope, rope_dim)

    def latent_prompt(
        hidden: Any,
        residual: Any,
        mlp_in: Any,
        layer_norms: Any,
        layer_epsilons: Any,
        query_norm: Any,
        latent_norm: Any,
        epsilons: Any,
        matrices: Any,
        panels: Any,
        scale: Any,
        cos: Any,
        sin: Any,
        latents: Any,
        slots: Any,
        positions: Any,
        projected: Any,
        expanded: Any,
        values: Any,
        out: Any,
        pairs: Any,
        begin: Any,
        half: Any,
    ) -> None:
        num_rows, end = hidden.shape[0], positions[-1] + 1
        queries = expanded if query_rank else projected
        cached = latents[slots[0], 0]
        if half != 2:
            read(
                *(hidden, mlp_in, layer_norms[0], layer_epsilons[0], query_norm, latent_norm, epsilons),
                *(matrices, panels, cos, sin, latents, slots, positions, projected, queries),
            )
            expand(
                *(matrices[5, 0, :1], matrices[5, 1, :1], matrices[5, 2, :1], np.array([0, end - begin]), panels[5]),
                *(rank, cached.ctypes.data + begin * row_dim * 4, row_dim * 4),
                *(pairs.ctypes.data + begin * pairs.shape[1] * 4, pairs.shape[1] * 4),
            )
        if half == 1:
            return
        length = (end + PANEL - 1) // PANEL * PANEL
        key_panels = np.empty((length // PANEL, query_dim, PANEL), np.float32)
        value_panels = np.empty((value_columns // PANEL, length, PANEL), np.float32)
        block, scores = np.empty((BLOCK, query_dim), np.float32), np.empty((BLOCK, length), np.float32)
        sums = np.empty((BLOCK, value_columns), np.float32)
        for position in range(end):
            pack_key(cached[position, rank:row_dim], position, key_panels[:, nope:])
        for head in range(heads):
            first_pair, first_query = head * (nope + value_dim), head * query_dim
            for position in range(end):
                pair = pairs[position, first_pair : first_pair + nope + value_dim]
                pack_key(pair[:nope], position, key_panels)
                pack_value(pair[nope:], position, value_panels)
            for first in range(0, num_rows, BLOCK):
                rows = slice(first, min(first + BLOCK, num_rows))
                count = rows.stop - first
                for number in range(count):
                    query = queries[first + number, first_query : first_query + query_dim]
                    copy_values(query[:nope], block[number])
                    rotate_one(query[nope:], cos[first + number], sin[first + number], block[number, nope:])
                attend(
                    *(block[:count], positions[first], end, key_panels, value_panels, scale),
                    *(values[rows, head * value_dim : (head + 1) * value_dim], scores, sums),
                )
        add(hidden, values, matrices[4], panels[4], out, residual, layer_norms[1], layer_epsilons[1], mlp_in)

    matrix = types.float32[:, ::1]
    signature = types.void(*COMMON, *[matrix] * 5, types.int64, types.int64)
    return compiled(latent_prompt, signature, variant=(shape, kinds), error_model="numpy")
