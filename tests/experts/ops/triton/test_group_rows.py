import pytest
import torch

from experts.ops.group_rows import group_rows
from experts.ops.sort import sort_by_expert


def routed(rows):
    """{(token, expert): weight} of sorted rows, and the experts' order."""
    offsets = rows.offsets_S1.tolist()
    pairs = {}
    for expert, start, end in zip(rows.expert_ids_S.tolist(), offsets, offsets[1:], strict=False):
        for row in range(start, end):
            pairs[int(rows.token_rows_R[row]), expert] = float(rows.weights_R[row])
    return pairs


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 32), (4, 8), (30, 8), (3, 200)])
def test_same_rows_as_sort_by_expert(device, num_tokens, num_experts):
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:4] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, 4, generator=generator)
    rows = group_rows(ids.to(device), weights.to(device), num_experts)
    assert routed(rows) == routed(sort_by_expert(ids, weights))
    assert rows.offsets_S1[-1] == num_tokens * 4
    assert {tensor.dtype for tensor in rows[:3]} == {torch.int32}


def test_rows_that_could_be_alone_are_not_sorted(device):
    ids = torch.tensor([[31, 3, 9, 0], [5, 3, 30, 2]], device=device)
    rows = group_rows(ids, torch.ones(2, 4, device=device), 32)
    assert rows.expert_ids_S.tolist() == [31, 3, 9, 0, 5, 3, 30, 2]
    assert rows.token_rows_R.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
