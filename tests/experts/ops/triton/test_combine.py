import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.ops._triton.combine import combine
from experts.ops.unpermute import unpermute_reference


@settings(max_examples=8, deadline=None)
@given(
    num_tokens=st.integers(1, 12),
    num_groups=st.sampled_from([1, 5, 40]),
    hidden_size=st.sampled_from([1, 96, 1100]),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_weighted_sum_of_each_tokens_rows(
    device, route, error, num_tokens, num_groups, hidden_size, padding, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    offsets, token_rows = route(generator, num_tokens, num_groups, density=0.3)
    rows = len(token_rows)
    if not rows + padding:
        return
    out = torch.randn(rows + padding, hidden_size, generator=generator).to(dtype)
    out[rows:] = torch.nan
    weights = torch.randn(rows + padding, generator=generator)
    padded_rows = torch.cat([token_rows, torch.zeros(padding, dtype=torch.int32)])
    partial = combine(out.to(device), offsets.to(device), padded_rows.to(device), weights.to(device), num_tokens)
    expected = unpermute_reference(out[:rows].double(), token_rows, weights[:rows].double(), num_tokens)
    assert partial.dtype == torch.float32
    assert error(partial, expected) < 1e-6


def test_rows_are_added_in_ascending_order(device):
    # In float32, 1e8 + 1 - 1e8 is 0 in this order and 1 in another.
    out = torch.tensor([[1e8], [1.0], [-1e8]], device=device)
    partial = combine(
        out,
        torch.tensor([0, 1, 2, 3], dtype=torch.int32, device=device),
        torch.zeros(3, dtype=torch.int32, device=device),
        torch.ones(3, device=device),
        1,
    )
    assert partial.item() == 0.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, in the interpreter
def test_not_a_number_reaches_its_token_only(device, bad):
    out = torch.ones(2, 4, device=device)
    out[1, 2] = bad
    indices = [torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, 2], [0, 1])]
    partial = combine(out, *indices, torch.ones(2, device=device), 2).cpu()
    assert partial[0].isfinite().all()
    assert not partial[1, 2].isfinite()
