"""Experts' rows back to their tokens: the router-weighted sum, in float32 and always in the same order.

The routed rows of a token are found through a table [T, S], -1 or the row of group s that belongs to the token; a token
goes at most once through an expert. No atomics: those would add in a different order every time.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows", "num_groups"])
def row_table_kernel(
    token_rows_ptr, offsets_ptr, table_ptr, num_rows, num_groups, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr
):
    """`table[token_rows[r], group of r] = r` for the rows below the last offset."""
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    group_R = tl.zeros((BLOCK_R,), tl.int32)
    for s0 in range(0, num_groups, BLOCK_S):
        groups_S = s0 + tl.arange(0, BLOCK_S)
        end_S = tl.load(offsets_ptr + groups_S + 1, mask=groups_S < num_groups, other=2147483647)
        group_R += tl.sum((end_S[None, :] <= rows_R[:, None]).to(tl.int32), 1)
    valid_R = (rows_R < num_rows) & (group_R < num_groups)
    tokens_R = tl.load(token_rows_ptr + rows_R, mask=valid_R, other=0).to(tl.int64)
    tl.store(table_ptr + tokens_R * num_groups + group_R, rows_R, mask=valid_R)


@triton.jit(do_not_specialize=["num_groups"])
def combine_kernel(
    out_ptr,
    weights_ptr,
    table_ptr,
    partial_ptr,
    num_groups,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`partial[t] = sum over t's rows r, ascending, of weights[r] * out[r]`."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = columns < H
    total = tl.zeros((BLOCK_H,), tl.float32)
    for s0 in range(0, num_groups, BLOCK_S):
        groups_S = s0 + tl.arange(0, BLOCK_S)
        rows_S = tl.load(table_ptr + token * num_groups + groups_S, mask=groups_S < num_groups, other=-1)
        found_S = rows_S >= 0
        rank_S = tl.cumsum(found_S.to(tl.int32), 0)
        for i in range(tl.sum(found_S.to(tl.int32), 0)):
            row = tl.sum(tl.where(found_S & (rank_S == i + 1), rows_S, 0), 0).to(tl.int64)
            values = tl.load(out_ptr + row * H + columns, mask=inside, other=0.0).to(tl.float32)
            total += tl.load(weights_ptr + row) * values
    tl.store(partial_ptr + token * H + columns, total, mask=inside)


def combine(
    out_RH: torch.Tensor,
    offsets_S1: torch.Tensor,
    token_rows_R: torch.Tensor,
    weights_R: torch.Tensor,
    num_tokens: int,
) -> torch.Tensor:
    """`partial_TH`, float32: each token's rows times their router weights, summed in ascending row order.

    out_RH: any float dtype, contiguous; offsets_S1, token_rows_R: int32; weights_R: float32. Rows from
    offsets_S1[-1] on are padding. A token without rows gets zeros.
    """
    num_rows, hidden_size = out_RH.shape
    num_groups = offsets_S1.numel() - 1
    table_TS = torch.full((num_tokens, num_groups), -1, dtype=torch.int32, device=out_RH.device)
    partial_TH = torch.empty((num_tokens, hidden_size), dtype=torch.float32, device=out_RH.device)
    row_table_kernel[(triton.cdiv(num_rows, 128),)](
        token_rows_R, offsets_S1, table_TS, num_rows, num_groups, BLOCK_R=128, BLOCK_S=32
    )
    block_columns = min(1024, triton.next_power_of_2(hidden_size))
    combine_kernel[(num_tokens, triton.cdiv(hidden_size, block_columns))](
        out_RH, weights_R, table_TS, partial_TH, num_groups, H=hidden_size, BLOCK_H=block_columns, BLOCK_S=32
    )
    return partial_TH
