"""A decode step's layer with latent attention, up to its MLP, as one function compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from cluster.serving._numba.attend import attend
from cluster.serving._numba.norm_and_rope import Rope, add_rows, normalise, normalise_rows, rotate
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import Kind, compile_matmul


@cache
def compile_latent_decode(
    *,
    heads: int,
    nope: int,
    rope_dim: int,
    rank: int,
    value_dim: int,
    query_rank: int,
    rope: Rope,
    kinds: tuple[Kind, ...],
) -> Callable[..., None]:
    """Norm, projections, norms of latents, rotary embedding, cache, attention to latents (DeepSeek-V2, section 2.1),
    output projection, residual, norm.

    query_rank: of the compressed queries; 0 where queries are projected at once
    kinds: of the five matrices below

    It runs without the GIL. Arguments, for T rows with one new token each:
        hidden        float32 [T, H]
        residual, mlp_in  float32 [T, H], written: `hidden` and its attention; the norm of that
        layer_norms   float32 [2, H]: weights of the norms before attention and after
        layer_epsilons  float32 [2]: theirs
        query_norm, latent_norm  float32 [query_rank], [rank];  their epsilons, float32 [2]
        matrices      int64 [5, 3, heads]: addresses of panels, scales and biases of (queries, or their latents, above
                      latents and rotary keys), of (queries from their latents), of W_UK and of W_UV of each head, and
                      of the output projection; one each but for W_UK and W_UV
        panels        int64 [5]: of each (of one head's W_UK and W_UV)
        layer         where in the cache
        scale         of the scores
        cos, sin      float32 [T, at least rope_dim / 2]
        latents       float32 [layers, slots, 1, C, rank + rope_dim]
        slots, positions  int64 [T]: where the new rows belong
        projected, expanded  float32 [T, whole panels] each, to work in; the second unused where query_rank is 0
        absorbed, summed, values  float32 [T, heads, rank + rope_dim], [T, heads, rank], [T, heads * value_dim], to
                      work in
        out           float32 [T, whole panels], to work in
    """
    into, from_latents, absorb, expand, onto = (compile_matmul(name, biased=biased) for name, biased in kinds)
    attend_one, rotate_one = attend(rank + rope_dim, rank), rotate(rope, rope_dim)
    query_dim, row_dim = nope + rope_dim, rank + rope_dim
    # Where the latents begin in a row of `projected`.
    before = query_rank or heads * query_dim

    def latent_decode(
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
        absorbed: Any,
        summed: Any,
        values: Any,
        out: Any,
    ) -> None:
        num_rows, hidden_size = hidden.shape
        starts = np.array([0, num_rows])
        queries = expanded if query_rank else projected
        normalise_rows(hidden, layer_norms[0], layer_epsilons[0], mlp_in)
        projected_bytes, query_bytes = projected.shape[1] * 4, queries.shape[1] * 4
        into(
            *(matrices[0, 0, :1], matrices[0, 1, :1], matrices[0, 2, :1], starts, panels[0], hidden_size),
            *(mlp_in.ctypes.data, hidden_size * 4, projected.ctypes.data, projected_bytes),
        )
        if query_rank:
            for row in range(num_rows):
                normalise(projected[row, :query_rank], query_norm, epsilons[0])
            from_latents(
                *(matrices[1, 0, :1], matrices[1, 1, :1], matrices[1, 2, :1], starts, panels[1], query_rank),
                *(projected.ctypes.data, projected_bytes, queries.ctypes.data, query_bytes),
            )
        for head in range(heads):
            one = slice(head, head + 1)
            absorb(
                *(matrices[2, 0, one], matrices[2, 1, one], matrices[2, 2, one], starts, panels[2], nope),
                *(queries.ctypes.data + head * query_dim * 4, query_bytes),
                *(absorbed.ctypes.data + head * row_dim * 4, heads * row_dim * 4),
            )
        longest = 0
        for row in range(num_rows):
            longest = max(longest, positions[row] + 1)
        scores = np.empty((heads, longest), np.float32)
        for row in range(num_rows):
            new = latents[layer, slots[row], 0, positions[row]]
            new[:rank] = projected[row, before : before + rank]
            normalise(new[:rank], latent_norm, epsilons[1])
            rotate_one(projected[row, before + rank : before + row_dim], cos[row], sin[row], new[rank:])
            for head in range(heads):
                first = head * query_dim + nope
                rotate_one(queries[row, first : first + rope_dim], cos[row], sin[row], absorbed[row, head, rank:])
            cached = latents[layer, slots[row], 0, : positions[row] + 1]
            attend_one(absorbed[row], cached, cached, scale, scores, summed[row])
        for head in range(heads):
            one = slice(head, head + 1)
            expand(
                *(matrices[3, 0, one], matrices[3, 1, one], matrices[3, 2, one], starts, panels[3], rank),
                *(summed.ctypes.data + head * rank * 4, heads * rank * 4),
                *(values.ctypes.data + head * value_dim * 4, heads * value_dim * 4),
            )
        onto(
            *(matrices[4, 0, :1], matrices[4, 1, :1], matrices[4, 2, :1], starts, panels[4], heads * value_dim),
            *(values.ctypes.data, heads * value_dim * 4, out.ctypes.data, out.shape[1] * 4),
        )
        add_rows(hidden, out, residual)
        normalise_rows(residual, layer_norms[1], layer_epsilons[1], mlp_in)

    matrix, cube, vector = types.float32[:, ::1], types.float32[:, :, ::1], types.float32[::1]
    numbers, addresses = types.int64[::1], types.int64[:, :, ::1]
    signature = types.void(
        *(matrix, matrix, matrix, matrix, vector, vector, vector, vector),
        *(addresses, numbers, types.int64, types.float32),
        *(matrix, matrix, types.float32[:, :, :, :, ::1], numbers, numbers),
        *(matrix, matrix, cube, cube, matrix, matrix),
    )
    variant = heads, nope, rope_dim, rank, value_dim, query_rank, rope, kinds
    return compiled(latent_decode, signature, variant=variant, error_model="numpy")
