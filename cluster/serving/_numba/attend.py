"""Softmax attention of new tokens over their sequence's cached tokens, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import njit

from experts.ops._numba.activations import exp
from experts.ops._numba.object_cache import SUMS, part

_ZERO, _ONE = np.float32(0), np.float32(1)


@njit(nogil=True, fastmath=False)  # the caller's SUMS must not reach `exp`, which rounds by adding and taking away
def _exponentials(scores, peak):  # type: ignore[no-untyped-def]
    for at in range(len(scores)):
        scores[at] = exp(scores[at] - peak)


@cache
def attend(key_dim: int, value_dim: int, *, causal: bool = False) -> Callable[..., None]:
    """A function for others to call, of float32 query [G, key_dim], keys [L, key_dim], values [L, at least value_dim],
    the scale of the scores, at least [G, L] to work in and out [G, value_dim].

    causal: queries are of tokens that follow each other, up to that of the last key, and a value that is no number
            reaches them all; otherwise each sees all keys
    """
    dims = key_dim, value_dim

    # Two queries and four keys at a time: what is loaded once is used more than once.
    @part(dims, fastmath=SUMS)
    def score(query, key, scale, scores):  # type: ignore[no-untyped-def]
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
                scores[g, at], scores[g, at + 1] = a0 * scale, a1 * scale
                scores[g, at + 2], scores[g, at + 3] = a2 * scale, a3 * scale
                scores[g + 1, at], scores[g + 1, at + 1] = b0 * scale, b1 * scale
                scores[g + 1, at + 2], scores[g + 1, at + 3] = b2 * scale, b3 * scale
        for g in range(num_queries):
            for at in range(whole if g < paired else 0, length):
                total = _ZERO
                for i in range(key_dim):
                    total += query[g, i] * key[at, i]
                scores[g, at] = total * scale

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

    @part((*dims, causal), fastmath=SUMS)
    def attend_one(query, key, value, scale, scores, out):  # type: ignore[no-untyped-def]
        num_queries, length = query.shape[0], key.shape[0]
        score(query, key, scale, scores)
        for g in range(num_queries):
            seen = length - (num_queries - 1 - g) if causal else length
            peak, check = scores[g, 0], _ZERO
            for at in range(seen):
                peak = max(peak, scores[g, at])
                check += scores[g, at] * _ZERO  # NaN where a score is NaN or infinite, which `exp` would hide
            _exponentials(scores[g, :seen], peak)
            total = check
            for at in range(seen):
                total += scores[g, at]
            share = _ONE / total
            for at in range(seen):
                scores[g, at] *= share
            for at in range(seen, length):
                scores[g, at] = _ZERO
        weigh(scores, value, out)

    compiled: Callable[..., None] = attend_one
    return compiled
