import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.ops._triton.sort import counting_sort


@settings(max_examples=10, deadline=None)
@given(num_rows=st.integers(1, 700), num_experts=st.sampled_from([1, 8, 70]), seed=st.integers(0, 99))
def test_equals_torchs_stable_sort(device, num_rows, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, num_experts, (num_rows,), generator=generator)
    order, offsets = counting_sort(ids.to(device), num_experts)
    kept = int((ids >= 0).sum())
    expected = torch.sort(ids, stable=True)[1][num_rows - kept :]
    assert order[:kept].tolist() == expected.tolist()
    assert offsets.tolist() == [0, *torch.bincount(ids[ids >= 0], minlength=num_experts).cumsum(0).tolist()]


def test_all_rows_on_one_expert(device):
    order, offsets = counting_sort(torch.full((300,), 2, device=device), 4)
    assert order.tolist() == list(range(300))
    assert offsets.tolist() == [0, 0, 0, 300, 300]
