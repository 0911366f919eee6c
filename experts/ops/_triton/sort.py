"""A stable counting sort of expert ids, on the device and without asking it anything: three launches."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_blocks"])
def histogram_kernel(
    ids_ptr, counts_ptr, num_rows, num_experts, num_blocks, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr
):
    """counts[e, b]: rows of expert e among the BLOCK_R rows of program b."""
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    ids_R = tl.load(ids_ptr + rows_R, mask=rows_R < num_rows, other=-1).to(tl.int32)
    for e0 in range(0, num_experts, BLOCK_E):
        experts_E = e0 + tl.arange(0, BLOCK_E)
        counts_E = tl.sum((ids_R[:, None] == experts_E[None, :]).to(tl.int32), 0)
        tl.store(counts_ptr + experts_E * num_blocks + tl.program_id(0), counts_E, mask=experts_E < num_experts)


@triton.jit(do_not_specialize=["num_rows", "num_experts", "num_blocks"])
def scatter_kernel(
    ids_ptr,
    ends_ptr,
    order_ptr,
    offsets_ptr,
    num_rows,
    num_experts,
    num_blocks,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """order[place of r] = r, from ends[e, b], the inclusive running sum of the counts; program 0 writes offsets."""
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    ids_R = tl.load(ids_ptr + rows_R, mask=rows_R < num_rows, other=-1).to(tl.int32)
    place_R = tl.zeros((BLOCK_R,), tl.int32)
    for e0 in range(0, num_experts, BLOCK_E):
        experts_E = e0 + tl.arange(0, BLOCK_E)
        inside_E = experts_E < num_experts
        hit_RE = (ids_R[:, None] == experts_E[None, :]) & inside_E[None, :]
        rank_RE = tl.cumsum(hit_RE.to(tl.int32), 0) - 1
        cell_E = experts_E * num_blocks + tl.program_id(0)
        start_E = tl.load(ends_ptr + cell_E - 1, mask=inside_E & (cell_E > 0), other=0)
        place_R += tl.sum(tl.where(hit_RE, start_E[None, :] + rank_RE, 0), 1)
        if tl.program_id(0) == 0:
            end_E = tl.load(ends_ptr + experts_E * num_blocks + num_blocks - 1, mask=inside_E, other=0)
            tl.store(offsets_ptr + 1 + experts_E, end_E, mask=inside_E)
    tl.store(order_ptr + place_R, rows_R, mask=(ids_R >= 0) & (ids_R < num_experts))


def counting_sort(ids_R: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order_R int32, offsets_E1 int32): rows of expert e are `order[offsets[e]:offsets[e+1]]`, ascending.

    ids_R: integers; ids outside of [0, num_experts) are left out, and order's entries from offsets[-1] on are 0.
    """
    num_rows = ids_R.numel()
    block = 256
    num_blocks = max(1, triton.cdiv(num_rows, block))
    counts = torch.empty((num_experts, num_blocks), dtype=torch.int32, device=ids_R.device)
    order_R = torch.zeros(num_rows, dtype=torch.int32, device=ids_R.device)
    offsets_E1 = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids_R.device)
    sizes = (num_rows, num_experts, num_blocks)
    histogram_kernel[(num_blocks,)](ids_R, counts, *sizes, BLOCK_R=block, BLOCK_E=32)
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    scatter_kernel[(num_blocks,)](ids_R, ends, order_R, offsets_E1, *sizes, BLOCK_R=block, BLOCK_E=32)
    return order_R, offsets_E1
