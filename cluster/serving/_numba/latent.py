"""A layer with latent attention, up to its MLP, token by token, as one function compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types

from cluster.serving._numba.add_attention import add_attention
from cluster.serving._numba.attend import attend
from cluster.serving._numba.latent_parts import LatentShape, read_tokens
from cluster.serving._numba.norm_and_rope import rotate
from experts.ops._numba.call import caller_of
from experts.ops._numba.memory import memory
from experts.ops._numba.object_cache import compiled, part
from experts.ops._numba.packed_matmul import Kind, compile_matmul

_MATRIX, _CUBE, _VECTOR = types.float32[:, ::1], types.float32[:, :, ::1], types.float32[::1]
_NUMBERS, _ADDRESSES = types.int64[::1], types.int64[:, :, ::1]
# Of the arguments up to `positions`.
COMMON = (
    *(_MATRIX, _MATRIX, _MATRIX, _MATRIX, _VECTOR, _VECTOR, _VECTOR, _VECTOR),
    *(_ADDRESSES, _NUMBERS, types.float32),
    *(_MATRIX, _MATRIX, types.float32[:, :, :, ::1], _NUMBERS, _NUMBERS),
)


@cache
def compile_latent(shape: LatentShape, kinds: tuple[Kind, ...]) -> Callable[..., None]:
    """Norm, projections, norms of latents, rotary embedding, cache, attention to latents (DeepSeek-V2, section 2.1),
    output projection, residual, norm.

    kinds: of the six matrices below

    It runs without the GIL. Arguments, for T rows with one new token each:
        hidden        float32 [T, H]
        residual, mlp_in  float32 [T, H], written: `hidden` and its attention; the norm of that
        layer_norms   float32 [2, H]: weights of the norms before attention and after
        layer_epsilons  float32 [2]: theirs
        query_norm, latent_norm  float32 [query_rank] (any where that is 0), [rank];  their epsilons, float32 [2]
        matrices      int64 [6, 3, heads]: addresses of panels, scales and biases of (queries, or their latents, above
                      latents and rotary keys), of (queries from their latents), of W_UK and of W_UV of each head, of
                      the output projection, and of all W_UK and W_UV as published; one each but for the third and
                      fourth
        panels        int64 [6]: of each (of one head's W_UK and W_UV)
        scale         of the scores
        cos, sin      float32 [T, at least rope_dim / 2]
        latents       float32 [slots, 1, C, rank + rope_dim], the layer's cache
        slots, positions  int64 [T]: where the new rows belong
        projected, expanded  float32 [T, whole panels] each, to work in; the second unused where query_rank is 0
        values, out   float32 [T, heads * value_dim], [T, whole panels], to work in
        absorbed, summed  float32 [T, heads, rank + rope_dim], [T, heads, rank], to work in
        half          1: up to the cache, 2: from there, in the same memory; 0: all
    """
    read, add = read_tokens(shape, *kinds[:2]), add_attention(shape.heads * shape.value_dim, kinds[4])
    absorb, expand = (compile_matmul(name, biased=biased) for name, biased in kinds[2:4])
    heads, nope, rope_dim, rank, value_dim = shape.heads, shape.nope, shape.rope_dim, shape.rank, shape.value_dim
    query_dim, row_dim, query_rank = shape.query_dim, shape.row_dim, shape.query_rank
    attend_one, rotate_one = attend(row_dim, rank), rotate(shape.rope, rope_dim)

    def latent(
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
        absorbed: Any,
        summed: Any,
        half: Any,
    ) -> None:
        num_rows = hidden.shape[0]
        starts = np.array([0, num_rows])
        queries = expanded if query_rank else projected
        if half != 2:
            read(
                *(hidden, mlp_in, layer_norms[0], layer_epsilons[0], query_norm, latent_norm, epsilons),
                *(matrices, panels, cos, sin, latents, slots, positions, projected, queries),
            )
        if half == 1:
            return
        for head in range(heads):
            one = slice(head, head + 1)
            absorb(
                *(matrices[2, 0, one], matrices[2, 1, one], matrices[2, 2, one], starts, panels[2], nope),
                *(queries.ctypes.data + head * query_dim * 4, queries.shape[1] * 4),
                *(absorbed.ctypes.data + head * row_dim * 4, heads * row_dim * 4),
            )
        longest = 0
        for row in range(num_rows):
            longest = max(longest, positions[row] + 1)
        scores = np.empty((heads, longest), np.float32)
        for row in range(num_rows):
            for head in range(heads):
                first = head * query_dim + nope
                rotate_one(queries[row, first : first + rope_dim], cos[row], sin[row], absorbed[row, head, rank:])
            cached = latents[slots[row], 0, : positions[row] + 1]
            attend_one(absorbed[row], cached, cached, scale, scores, summed[row])
        for head in range(heads):
            one = slice(head, head + 1)
            expand(
                *(matrices[3, 0, one], matrices[3, 1, one], matrices[3, 2, one], starts, panels[3], rank),
                *(summed.ctypes.data + head * rank * 4, heads * rank * 4),
                *(values.ctypes.data + head * value_dim * 4, heads * value_dim * 4),
            )
        add(hidden, values, matrices[4], panels[4], out, residual, layer_norms[1], layer_epsilons[1], mlp_in)

    signature = types.void(*COMMON, *[_MATRIX] * 4, _CUBE, _CUBE, types.int64)
    return compiled(latent, signature, variant=(shape, kinds), error_model="numpy")


CONSTANTS = types.Tuple(
    (
        *(_CUBE, _MATRIX, _MATRIX, _MATRIX, _MATRIX, types.int64[:, :, :, ::1], types.int64[:, ::1]),
        _VECTOR,
    )
)
WORK = types.Tuple((*[_MATRIX] * 4, _CUBE, _CUBE))


@cache
def attend_rows(shape: LatentShape, kinds: tuple[Kind, ...]) -> Callable[..., None]:
    """One of several layers for some rows of a step, as a function for others to call; see `compile_decode_layers`.

    address:   of what `compile_latent` makes
    constants: its arguments from `layer_norms` to `scale`, each with a number for every layer (CONSTANTS)
    caches:    address of the layer's latents, nothing, how many slots there are, and C
    work:      what is to work in there, for all rows of the step (WORK)
    """
    call, row_dim = caller_of(compile_latent(shape, kinds)), shape.row_dim

    @part((row_dim,))
    def attend(address, number, rows, hidden, residual, mlp_in, constants, cos, sin, caches, slots, positions, work):  # type: ignore[no-untyped-def]
        size = (caches[2], 1, caches[3], row_dim)
        arguments = (
            hidden[rows], residual[rows], mlp_in[rows], constants[0][number], constants[1][number],
            constants[2][number], constants[3][number], constants[4][number], constants[5][number],
            constants[6][number], constants[7][number], cos[rows], sin[rows],
            numba.carray(memory(caches[0]), size, np.float32), slots[rows], positions[rows], work[0][rows],
            work[1][rows], work[2][rows], work[3][rows], work[4][rows], work[5][rows], 0,
        )  # fmt: skip
        call(address, arguments)

    function: Callable[..., None] = attend
    return function
