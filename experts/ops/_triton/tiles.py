"""The tile table: which rows and whose weights each row tile of a grouped matmul works on.

int64 [1 + bound, 4]: record 0 is (number of tiles, -, -, -), record 1 + i is tile i's
(address of the expert's slot, first row, end of the expert's rows, -). The number of tiles is known on the device
alone, `bound = min(R, R // BLOCK_R + S)` on the host as well.
"""

import torch
import triton
import triton.language as tl

RECORD = tl.constexpr(4)


@triton.jit
def load_tile(tiles_ptr, tile):
    """(slot address, first row, end of the expert's rows) of a tile."""
    record_ptr = tiles_ptr + (tile + 1) * RECORD
    row = tl.load(record_ptr + 1).to(tl.int32)
    end = tl.load(record_ptr + 2).to(tl.int32)
    return tl.load(record_ptr), row, end


@triton.jit(do_not_specialize=["num_groups", "bound"])
def tile_table_kernel(
    slots_ptr,
    offsets_ptr,
    addresses_ptr,
    tiles_ptr,
    num_groups,
    bound,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Each program writes BLOCK_T records; all of them walk the S offsets, BLOCK_S at a time."""
    tiles_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    address_T = tl.zeros((BLOCK_T,), tl.int64)
    row_T = tl.zeros((BLOCK_T,), tl.int64)
    end_T = tl.zeros((BLOCK_T,), tl.int64)
    num_tiles = tl.program_id(0) * 0
    for s0 in range(0, num_groups, BLOCK_S):
        groups_S = s0 + tl.arange(0, BLOCK_S)
        inside_S = groups_S < num_groups
        begin_S = tl.load(offsets_ptr + groups_S, mask=inside_S, other=0)
        end_S = tl.load(offsets_ptr + groups_S + 1, mask=inside_S, other=0)
        slots_S = tl.load(slots_ptr + groups_S, mask=inside_S, other=0)
        address_S = tl.load(addresses_ptr + slots_S, mask=inside_S, other=0)
        count_S = (end_S - begin_S + BLOCK_R - 1) // BLOCK_R
        stop_S = num_tiles + tl.cumsum(count_S, 0)
        start_S = stop_S - count_S
        hit_TS = (tiles_T[:, None] >= start_S[None, :]) & (tiles_T[:, None] < stop_S[None, :])
        first_row_TS = begin_S[None, :] + (tiles_T[:, None] - start_S[None, :]) * BLOCK_R
        address_T += tl.sum(tl.where(hit_TS, address_S[None, :], 0), 1)
        row_T += tl.sum(tl.where(hit_TS, first_row_TS, 0), 1).to(tl.int64)
        end_T += tl.sum(tl.where(hit_TS, end_S[None, :], 0), 1).to(tl.int64)
        num_tiles += tl.sum(count_S, 0)
    record_ptrs = tiles_ptr + (tiles_T + 1) * RECORD
    inside_T = tiles_T < bound
    tl.store(record_ptrs, address_T, mask=inside_T)
    tl.store(record_ptrs + 1, row_T, mask=inside_T)
    tl.store(record_ptrs + 2, end_T, mask=inside_T)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr, num_tiles.to(tl.int64))


def tile_table(
    slots_S: torch.Tensor, offsets_S1: torch.Tensor, addresses: torch.Tensor, *, num_rows: int, block_rows: int
) -> torch.Tensor:
    """The table for tiles of `block_rows` rows; one launch, no host sync.

    slots_S, offsets_S1: int32; addresses: int64, first byte of every slot.
    """
    num_groups = slots_S.numel()
    bound = min(num_rows, num_rows // block_rows + num_groups)
    tiles = torch.empty((1 + bound, RECORD.value), dtype=torch.int64, device=slots_S.device)
    block_tiles = 32
    tile_table_kernel[(triton.cdiv(bound, block_tiles),)](
        slots_S, offsets_S1, addresses, tiles, num_groups, bound, BLOCK_R=block_rows, BLOCK_T=block_tiles, BLOCK_S=32
    )
    return tiles
