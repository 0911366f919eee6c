"""Grouped matmul for few rows an expert: bound by reading weights, so operands are swapped.

`dot(W, X^T)` puts the weights' rows where wgmma wants 64 of them and the tokens where it takes 8 or 16; the other way
round, 16 rows would fall back to mma.sync. Weights of another dtype than the rows are 8-bit codes (int8 + 128) with a
scale per row, widened in registers: for these this kernel serves prefill too.
"""

import triton
import triton.language as tl

from experts.ops._triton.epilogue import store_rows
from experts.ops._triton.tiles import load_tile


@triton.jit
def widen_int8(code, dtype: tl.constexpr):
    """`code - 128` for uint8 codes: pasted under 2^23 and subtracted, since int-to-float runs at a quarter rate."""
    pasted = (code.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
    return (pasted - 8388736.0).to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def decode_kernel(
    x_ptr,
    x_scale_ptr,
    token_rows_ptr,
    tiles_ptr,
    out_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    K_STORED: tl.constexpr,
    X_STRIDE: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    BIAS_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    GATHER: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`out[r] = epilogue(x[token_rows[r]] @ W[slot of r].T)`, one program a tile. See `grouped_matmul`."""
    if tl.program_id(1) >= tl.load(tiles_ptr):
        return
    address, row, end = load_tile(tiles_ptr, tl.program_id(1))
    n0 = tl.program_id(0) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_R)
    valid = rows < end
    if GATHER:
        source = tl.load(token_rows_ptr + rows, mask=valid, other=0).to(tl.int64)
    else:
        source = tl.where(valid, rows, row).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + source[None, :] * X_STRIDE + ks[:, None]
    w_rows = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
    w_ptr = tl.multiple_of((address + WEIGHT_OFFSET).to(tl.pointer_type(WEIGHT_DTYPE)), 16)
    w_ptrs = w_ptr + w_rows[:, None] * K_STORED + ks[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        w = tl.load(w_ptrs + k)
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=(ks < K - k)[:, None], other=0.0)
        if tl.uint8 == WEIGHT_DTYPE:
            w = widen_int8(w, x_ptr.dtype.element_ty)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    if x_scale_ptr is not None:
        row_scale = tl.load(x_scale_ptr + source, mask=valid, other=0.0)
    else:
        row_scale = None
    store_rows(
        tl.trans(acc), row_scale, out_ptr, rows, valid, n0, address, N, OUT_STRIDE, SCALE_OFFSET, BIAS_OFFSET,
        ACTIVATION, GATED, LIMIT, UP_SHIFT, BLOCK_R, BLOCK_N,
    )  # fmt: skip
