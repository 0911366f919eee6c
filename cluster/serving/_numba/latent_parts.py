"""What all tokens of a layer with latent attention go through before it, as a function for others to call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from cluster.serving._numba.norm_and_rope import Rope, copy_values, normalise, normalise_rows, rotate
from experts.ops._numba.object_cache import part
from experts.ops._numba.packed_matmul import Kind, compile_matmul


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentShape:
    """query_rank: of the compressed queries; 0 where queries are projected at once."""

    heads: int
    nope: int
    rope_dim: int
    rank: int
    value_dim: int
    query_rank: int
    rope: Rope

    @property
    def query_dim(self) -> int:
        """Of a head's query, and of its key where keys are expanded."""
        return self.nope + self.rope_dim

    @property
    def row_dim(self) -> int:
        """Of a token's row in the cache: its latent, and the rotary key that all heads share."""
        return self.rank + self.rope_dim


@cache
def read_tokens(shape: LatentShape, into_kind: Kind, from_latents_kind: Kind) -> Callable[..., None]:
    """Norm, projections, norms of latents, rotary embedding of keys, cache; see `compile_latent`.

    Queries are ready but for their rotary parts, which are not turned yet.
    """
    into, from_latents = (compile_matmul(name, biased=biased) for name, biased in (into_kind, from_latents_kind))
    rotate_one = rotate(shape.rope, shape.rope_dim)
    rank, row_dim, query_rank = shape.rank, shape.row_dim, shape.query_rank
    # Where the latents begin in a row of `projected`.
    before = query_rank or shape.heads * shape.query_dim

    @part((shape, into_kind, from_latents_kind))
    def read(  # type: ignore[no-untyped-def]
        hidden,
        normed,
        layer_norm,
        layer_epsilon,
        query_norm,
        latent_norm,
        epsilons,
        matrices,
        panels,
        cos,
        sin,
        latents,
        slots,
        positions,
        projected,
        queries,
    ):
        num_rows, hidden_size = hidden.shape
        starts = np.array([0, num_rows])
        projected_bytes = projected.shape[1] * 4
        normalise_rows(hidden, layer_norm, layer_epsilon, normed)
        into(
            *(matrices[0, 0, :1], matrices[0, 1, :1], matrices[0, 2, :1], starts, panels[0], hidden_size),
            *(normed.ctypes.data, hidden_size * 4, projected.ctypes.data, projected_bytes),
        )
        if query_rank:
            for row in range(num_rows):
                normalise(projected[row, :query_rank], query_norm, epsilons[0])
            from_latents(
                *(matrices[1, 0, :1], matrices[1, 1, :1], matrices[1, 2, :1], starts, panels[1], query_rank),
                *(projected.ctypes.data, projected_bytes, queries.ctypes.data, queries.shape[1] * 4),
            )
        for row in range(num_rows):
            new = latents[slots[row], 0, positions[row]]
            copy_values(projected[row, before : before + rank], new)
            normalise(new[:rank], latent_norm, epsilons[1])
            rotate_one(projected[row, before + rank : before + row_dim], cos[row], sin[row], new[rank:])

    compiled: Callable[..., None] = read
    return compiled
