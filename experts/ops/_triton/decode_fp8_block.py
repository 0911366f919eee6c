"""Grouped matmul for few rows an expert, fp8 with 128x128 weight scales and 1x128 activation scales.

As `decode`, but every 128 columns the tensor cores' sum is scaled and promoted into a float32 accumulator.
"""

import triton
import triton.language as tl

from experts.ops._triton.epilogue import store_rows
from experts.ops._triton.prefill_fp8_block import block_scales
from experts.ops._triton.tiles import load_tile


@triton.jit(do_not_specialize=["num_rows"])
def decode_fp8_block_kernel(
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
    """As `decode.decode_kernel`; x_scale_ptr: float32 [rows of x, ceil(K/128)]."""
    tl.static_assert(BLOCK_K == 128)
    if tl.program_id(1) >= tl.load(tiles_ptr):
        return
    K_BLOCKS: tl.constexpr = (K + 127) // 128
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
    x_scale_ptrs = x_scale_ptr + source * K_BLOCKS
    w_rows = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
    w_ptr = tl.multiple_of((address + WEIGHT_OFFSET).to(tl.pointer_type(WEIGHT_DTYPE)), 16)
    w_ptrs = w_ptr + w_rows[:, None] * K_STORED + ks[None, :]
    w_scale_ptr = (address + SCALE_OFFSET).to(tl.pointer_type(tl.float32))
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for k_block in range(K_BLOCKS):
        k = k_block * BLOCK_K
        w = tl.load(w_ptrs + k)
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + k)
        else:
            x = tl.load(x_ptrs + k, mask=(ks < K - k)[:, None], other=0.0)
        x_scale = tl.load(x_scale_ptrs + k_block)
        w_scale = block_scales(w_scale_ptr, n0, k_block, N, K, GATED, BLOCK_N)
        acc += tl.dot(w, x) * (w_scale[:, None] * x_scale[None, :])
    store_rows(
        tl.trans(acc), None, out_ptr, rows, valid, n0, address, N, OUT_STRIDE, -1, BIAS_OFFSET,
        ACTIVATION, GATED, LIMIT, UP_SHIFT, BLOCK_R, BLOCK_N,
    )  # fmt: skip
