"""Weighted sums against the definition in float64, and their order."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.ops.unpermute import unpermute, unpermute_reference


@given(
    num_tokens=st.integers(1, 12),
    rows=st.lists(st.integers(0, 11), max_size=40),
    hidden=st.integers(1, 70),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_reference(num_tokens: int, rows: list[int], hidden: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows_R = torch.tensor([row % num_tokens for row in rows], dtype=torch.int32)
    out_RH = torch.randn(len(rows), hidden, generator=generator)
    weights_R = torch.rand(len(rows), generator=generator)
    got = unpermute(out_RH, rows_R, weights_R, num_tokens)
    expected = unpermute_reference(out_RH.double(), rows_R, weights_R, num_tokens)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_order_of_the_sum_is_that_of_the_rows() -> None:
    """1e8 + 1 - 1e8 is 0 in float32 in that order, 1 in another."""
    out_RH = torch.tensor([[1e8], [1.0], [-1e8], [5.0]])
    rows_R = torch.tensor([1, 1, 1, 0], dtype=torch.int32)
    assert unpermute(out_RH, rows_R, torch.ones(4), 2).tolist() == [[5.0], [0.0]]
    order = [0, 2, 1, 3]
    assert unpermute(out_RH[order], rows_R, torch.ones(4), 2).tolist() == [[5.0], [1.0]]
