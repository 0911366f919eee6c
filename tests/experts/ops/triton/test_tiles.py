import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.ops._triton.tiles import tile_table


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=90).filter(any),
    block_rows=st.sampled_from([16, 64]),
    seed=st.integers(0, 9),
)
def test_every_row_lies_in_one_tile_of_its_expert(device, counts, block_rows, seed):
    slots = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[: len(counts)].int()
    addresses = torch.arange(200) * 4096 + (1 << 40)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    num_rows = sum(counts) + seed  # the last rows are padding
    tiles = tile_table(
        slots.to(device), offsets.to(device), addresses.to(device), num_rows=num_rows, block_rows=block_rows
    ).cpu()
    expected = [
        [int(addresses[slot]), row, end]
        for slot, start, end in zip(slots, offsets.tolist(), offsets.tolist()[1:], strict=False)
        for row in range(start, end, block_rows)
    ]
    assert tiles[0, 0] == len(expected)
    assert tiles[1 : 1 + len(expected), :3].tolist() == expected
    assert len(expected) <= len(tiles) - 1 <= num_rows


def test_rows_with_an_expert_each_get_a_tile_each(device):
    tiles = tile_table(
        torch.tensor([3, 0, 3], dtype=torch.int32, device=device),
        torch.arange(4, dtype=torch.int32, device=device),
        torch.tensor([100, 200, 300, 400], device=device),
        num_rows=3,
        block_rows=16,
    ).cpu()
    assert tiles[1:, :3].tolist() == [[400, 0, 1], [100, 1, 2], [400, 2, 3]]
