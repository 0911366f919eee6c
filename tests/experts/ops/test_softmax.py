from __future__ import annotations

import numpy as np
import pytest

from experts.ops._numba.softmax import softmax


@pytest.mark.parametrize("count", [1, 2, 7, 15, 16, 17, 63, 64, 65, 300])
@pytest.mark.parametrize("spread", [0.0, 1.0, 60.0])
def test_it_is_the_float64_one_and_writes_nothing_else(count: int, spread: float) -> None:
    rng = np.random.default_rng(count)
    memory = np.concatenate([rng.normal(size=count) * spread, np.full(40, 7.0)]).astype(np.float32)
    exponents = memory[:count].astype(np.float64) * np.float32(0.37)
    expected = np.exp(exponents - exponents.max())
    softmax(memory[:count], np.float32(0.37))
    np.testing.assert_allclose(memory[:count], expected / expected.sum(), atol=3e-7)
    assert (memory[count:] == 7).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 15, 16, 20])
def test_what_is_no_number_makes_all_nan(value: float, place: int) -> None:
    scores = np.linspace(-1, 1, 21).astype(np.float32)
    scores[place] = value
    softmax(scores, np.float32(1))
    assert np.isnan(scores).all()
