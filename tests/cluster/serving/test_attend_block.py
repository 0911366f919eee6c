from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from numba import njit

from cluster.serving._numba.attend_block import BLOCK, attend_block, pack_key, pack_value, whole_panels
from experts.ops._numba.vectors import PANEL

# Not whole panels, but for the first.
DIMS = [(64, 64), (56, 24), (8, 40)]


@cache
def callable_attend(key_dim: int, value_dim: int) -> Callable[..., None]:
    """Compiled functions call it, not Python."""
    attend = attend_block(key_dim, value_dim)
    compiled: Callable[..., None] = njit(lambda *arguments: attend(*arguments))
    return compiled


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize(("position", "count"), [(0, BLOCK), (5, 1), (31, 3), (100, BLOCK), (77, 13)])
@pytest.mark.parametrize("window", [10, 64, 1 << 62])
def test_a_block_is_what_each_token_gets_in_float64(
    dims: tuple[int, int], position: int, count: int, window: int
) -> None:
    key_dim, value_dim = dims
    length = position + count
    rng = np.random.default_rng(0)
    queries, keys, values = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((count, key_dim), (length, key_dim), (length, value_dim))
    )
    whole = whole_panels(length)
    # What was never packed must reach nobody.
    key_panels = np.full((whole // PANEL, key_dim, PANEL), np.nan, np.float32)
    value_panels = np.full((whole_panels(value_dim) // PANEL, whole, PANEL), np.nan, np.float32)
    for at in range(length):
        pack_key(keys[at], at, key_panels)
        pack_value(values[at], at, value_panels)
    out = np.empty((count, value_dim), np.float32)
    work = np.empty((BLOCK, whole), np.float32), np.empty((BLOCK, whole_panels(value_dim)), np.float32)
    callable_attend(key_dim, value_dim)(
        queries, position, window, key_panels, value_panels, np.float32(0.2), out, *work
    )
    scores = 0.2 * queries.astype(np.float64) @ keys.T.astype(np.float64)
    at, tokens = np.arange(length)[None], position + np.arange(count)[:, None]
    scores[(at > tokens) | (at <= tokens - window)] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    expected = weights / weights.sum(axis=1, keepdims=True) @ values
    np.testing.assert_allclose(out, expected, atol=3e-6)
