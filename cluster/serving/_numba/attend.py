"""Softmax attention of one new token over its sequence's cached tokens, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit

from experts.ops._numba.activations import exp

_ZERO, _ONE = np.float32(0), np.float32(1)
# Sums may be taken in vectors; NaN and infinity still mean what they mean.
SUMS = {"contract", "nsz", "reassoc"}


@njit(nogil=True, fastmath=False)  # the caller's SUMS must not reach `exp`, which rounds by adding and taking away
def _exponentials(scores, peak):  # type: ignore[no-untyped-def]
    for at in range(len(scores)):
        scores[at] = exp(scores[at] - peak)


@cache
def attend(key_dim: int, value_dim: int) -> Callable[..., None]:
    """A function for others to call, of float32 query [G, key_dim], keys [L, key_dim], values [L, at least value_dim],
    the scale of the scores, [G, L] to work in and out [G, value_dim]."""

    @njit(nogil=True, fastmath=SUMS)
    def attend_one(query, key, value, scale, scores, out):  # type: ignore[no-untyped-def]
        num_queries, length = query.shape[0], key.shape[0]
        for at in range(length):
            for g in range(num_queries):
                score = _ZERO
                for i in range(key_dim):
                    score += query[g, i] * key[at, i]
                scores[g, at] = score * scale
        for g in range(num_queries):
            peak, check = scores[g, 0], _ZERO
            for at in range(length):
                peak = max(peak, scores[g, at])
                check += scores[g, at] * _ZERO  # NaN where a score is NaN or infinite, which `exp` would hide
            _exponentials(scores[g, :length], peak)
            total = check
            for at in range(length):
                total += scores[g, at]
            for i in range(value_dim):
                out[g, i] = _ZERO
            for at in range(length):
                weight = scores[g, at]
                for i in range(value_dim):
                    out[g, i] += weight * value[at, i]
            share = _ONE / total
            for i in range(value_dim):
                out[g, i] *= share

    compiled: Callable[..., None] = attend_one
    return compiled
