"""Grouped matmul with int4 weights, one scale for 128 columns of a row, for any number of rows. As `decode` otherwise.

Codes are packed so that a byte widens without shuffling: byte j of a group of 128 columns holds column j in its low
nibble and column j + 64 in its high one (`experts.quant.int4`).
"""

import triton
import triton.language as tl

from experts.ops._triton.epilogue import store_rows
from experts.ops._triton.tiles import load_tile


@triton.jit
def widen_int4(nibble, dtype: tl.constexpr):
    """`nibble - 8`: bits pasted under 2^10 (fp16) or 2^7 (bf16) and subtracted, one instruction for two values."""
    if dtype == tl.float16:
        return (nibble.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    elif dtype == tl.bfloat16:
        return (nibble.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    else:
        return nibble.to(dtype) - 8.0


@triton.jit(do_not_specialize=["num_rows"])
def decode_int4_kernel(
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
    """As `decode.decode_kernel`; weights uint8 [N, K_STORED / 2], scales float32 [N, K_STORED / 128]."""
    tl.static_assert(BLOCK_K == 128)
    if tl.program_id(1) >= tl.load(tiles_ptr):
        return
    K_BLOCKS: tl.constexpr = K_STORED // 128
    address, row, end = load_tile(tiles_ptr, tl.program_id(1))
    n0 = tl.program_id(0) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_R)
    valid = rows < end
    if GATHER:
        source = tl.load(token_rows_ptr + rows, mask=valid, other=0).to(tl.int64)
    else:
        source = tl.where(valid, rows, row).to(tl.int64)
    half = tl.arange(0, 64)
    x_ptrs = x_ptr + source[None, :] * X_STRIDE + half[:, None]
    w_rows = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1)
    w_ptr = tl.multiple_of((address + WEIGHT_OFFSET).to(tl.pointer_type(WEIGHT_DTYPE)), 16)
    w_ptrs = w_ptr + w_rows[:, None] * (K_STORED // 2) + half[None, :]
    w_scale_ptrs = (address + SCALE_OFFSET).to(tl.pointer_type(tl.float32)) + w_rows * K_BLOCKS
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for k_block in range(K_BLOCKS):
        k = k_block * BLOCK_K
        codes = tl.load(w_ptrs + k_block * 64)
        if K % BLOCK_K == 0:
            x_low = tl.load(x_ptrs + k)
            x_high = tl.load(x_ptrs + k + 64)
        else:
            x_low = tl.load(x_ptrs + k, mask=(half < K - k)[:, None], other=0.0)
            x_high = tl.load(x_ptrs + k + 64, mask=(half < K - k - 64)[:, None], other=0.0)
        scale = tl.load(w_scale_ptrs + k_block)
        part = tl.dot(widen_int4(codes & 15, x_ptr.dtype.element_ty), x_low, input_precision="ieee")
        part = tl.dot(widen_int4(codes >> 4, x_ptr.dtype.element_ty), x_high, part, input_precision="ieee")
        acc += part * scale[:, None]
    store_rows(
        tl.trans(acc), None, out_ptr, rows, valid, n0, address, N, OUT_STRIDE, -1, BIAS_OFFSET,
        ACTIVATION, GATED, LIMIT, UP_SHIFT, BLOCK_R, BLOCK_N,
    )  # fmt: skip
