"""A layer with latent attention, up to its MLP, for a prompt's tokens at once, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from cluster.serving._numba.attend import attend
from cluster.serving._numba.latent import COMMON
from cluster.serving._numba.latent_parts import LatentShape, add_attention, read_tokens
from cluster.serving._numba.norm_and_rope import rotate
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import Kind, compile_matmul


@cache
def compile_latent_prompt(shape: LatentShape, kinds: tuple[Kind, ...], *, block_size: int) -> Callable[..., None]:
    """As `compile_latent`, for T tokens of one sequence that follow each other, with keys and values expanded.

    block_size: queries that look at a head's keys together: fewer read them more often, more compute scores that nobody
                may see

    It runs without the GIL. Arguments as there up to `out`, and instead of the last three:
        pairs   float32 [L, whole panels]: keys, without their rotary parts, and values of the sequence's L positions so
                far, this part's being the last
        begin   position from which on they are to be expanded; others are by then, or by the second half
        half    1: up to `pairs`, 2: from there, in the same memory; 0: all
    """
    read, add = read_tokens(shape, *kinds[:2]), add_attention(shape, kinds[4])
    expand = compile_matmul(kinds[5][0], biased=kinds[5][1])
    heads, nope, rope_dim, rank, value_dim = shape.heads, shape.nope, shape.rope_dim, shape.rank, shape.value_dim
    query_dim, row_dim, query_rank = shape.query_dim, shape.row_dim, shape.query_rank
    attend_block, rotate_one = attend(query_dim, value_dim, causal=True), rotate(shape.rope, rope_dim)

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
        layer: Any,
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
        cached = latents[layer, slots[0], 0]
        if half != 2:
            read(
                *(hidden, mlp_in, layer_norms[0], layer_epsilons[0], query_norm, latent_norm, epsilons),
                *(matrices, panels, layer, cos, sin, latents, slots, positions, projected, queries),
            )
            expand(
                *(matrices[5, 0, :1], matrices[5, 1, :1], matrices[5, 2, :1], np.array([0, end - begin]), panels[5]),
                *(rank, cached.ctypes.data + begin * row_dim * 4, row_dim * 4),
                *(pairs.ctypes.data + begin * pairs.shape[1] * 4, pairs.shape[1] * 4),
            )
        if half == 1:
            return
        keys, head_values = np.empty((end, query_dim), np.float32), np.empty((end, value_dim), np.float32)
        block, sums = np.empty((block_size, query_dim), np.float32), np.empty((block_size, value_dim), np.float32)
        scores = np.empty((block_size, end), np.float32)
        for head in range(heads):
            first_pair, first_query = head * (nope + value_dim), head * query_dim
            for position in range(end):
                for i in range(nope):
                    keys[position, i] = pairs[position, first_pair + i]
                for i in range(rope_dim):
                    keys[position, nope + i] = cached[position, rank + i]
                for i in range(value_dim):
                    head_values[position, i] = pairs[position, first_pair + nope + i]
            for first in range(0, num_rows, block_size):
                count = min(block_size, num_rows - first)
                for number in range(count):
                    row = first + number
                    query = queries[row, first_query : first_query + query_dim]
                    for i in range(nope):
                        block[number, i] = query[i]
                    rotate_one(query[nope:], cos[row], sin[row], block[number, nope:])
                seen = positions[first + count - 1] + 1
                attend_block(block[:count], keys[:seen], head_values[:seen], scale, scores, sums[:count])
                for number in range(count):
                    for i in range(value_dim):
                        values[first + number, head * value_dim + i] = sums[number, i]
        add(hidden, values, matrices[4], panels[4], out, residual, layer_norms[1], layer_epsilons[1], mlp_in)

    matrix = types.float32[:, ::1]
    signature = types.void(*COMMON, *[matrix] * 5, types.int64, types.int64)
    return compiled(latent_prompt, signature, variant=(shape, kinds, block_size), error_model="numpy")
