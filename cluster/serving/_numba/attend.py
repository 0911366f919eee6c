"""Softmax attention of a new token over its sequence's cached tokens, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from experts.ops._numba.object_cache import SUMS, part
from experts.ops._numba.softmax import softmax

_ZERO = np.float32(0)


@cache
def attend(key_dim: int, value_dim: int) -> Callable[..., None]:
    """A function for others to call, of float32 query [G, key_dim], keys [L, key_dim], values [L, at least value_dim],
    the scale of the scores, at least [G, L] to work in and out [G, value_dim].
    """
    dims = key_dim, value_dim

    # Two queries and four keys at a time: what is loaded once is used more than once.
    @part(dims, fastmath=SUMS)
    def score(query, key, scores):  # type: ignore[no-untyped-def]
        num_queries, length = query.shape[0], key.shape[0]
        paired, whole = num_queries - num_queries % 2, length - length % 4
        for at in range(0, whole, 4):
            for g in range(0, paired, 2):
                a0, a1, a2, a3, b0, b1, b2, b3 = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
                for i in range(key_dim):
                    a, b = query[g, i], query[g + 1, i]
                    a0 += a * key[at, i]
                    a1 += a * key[at + 1, i]
                    a2 += a * key[at + 2, i]
                    a3 += a * key[at + 3, i]
                    b0 += b * key[at, i]
                    b1 += b * key[at + 1, i]
                    b2 += b * key[at + 2, i]
                    b3 += b * key[at + 3, i]
                scores[g, at], scores[g, at + 1], scores[g, at + 2], scores[g, at + 3] = a0, a1, a2, a3
                scores[g + 1, at], scores[g + 1, at + 1], scores[g + 1, at + 2], scores[g + 1, at + 3] = b0, b1, b2, b3
        for g in range(num_queries):
            for at in range(whole if g < paired else 0, length):
                total = _ZERO
                for i in range(key_dim):
                    total += query[g, i] * key[at, i]
                scores[g, at] = total

    @part(dims, fastmath=SUMS)
    def weigh(weights, value, out):  # type: ignore[no-untyped-def]
        num_queries, length = out.shape[0], value.shape[0]
        whole = length - length % 4
        for g in range(num_queries):
            for i in range(value_dim):
                out[g, i] = _ZERO
        for at in range(0, whole, 4):
            for g in range(num_queries):
                a0, a1, a2, a3 = weights[g, at], weights[g, at + 1], weights[g, at + 2], weights[g, at + 3]
                for i in range(value_dim):
                    out[g, i] += (
                        a0 * value[at, i] + a1 * value[at + 1, i] + a2 * value[at + 2, i] + a3 * value[at + 3, i]
                    )
        for at in range(whole, length):
            for g in range(num_queries):
                weight = weights[g, at]
                for i in range(value_dim):
                    out[g, i] += weight * value[at, i]

    @part(dims, fastmath=SUMS)
    def attend_one(query, key, value, scale, scores, out):  # type: ignore[no-untyped-def]
        score(query, key, scores)
        for g in range(query.shape[0]):
            softmax(scores[g, : key.shape[0]], scale)
        weigh(scores, value, out)

    compiled: Callable[..., None] = attend_one
    return compiled
