"""Grouped matmul for many rows an expert, fp8 with scales of 128x128 weights and 1x128 activations.

As `prefill`, but every 128 columns the tensor cores' sum is scaled and promoted into a float32 accumulator
(arXiv 2412.19437, 3.3.2).
"""

import triton
import triton.language as tl

from experts.ops._triton.epilogue import store_rows
from experts.ops._triton.prefill import banded
from experts.ops._triton.tiles import load_tile


@triton.jit
def block_scales(scale_ptr, n0, k_block, N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """float32 [BLOCK_N], the scale of each weight row for one block of 128 columns.

    scale_ptr: [ceil(N/128), ceil(K/128)], gated [2 * ceil(N/2/128), ceil(K/128)], gate's blocks over up's. The rows of
    a tile lie in one block of gate and one of up, since BLOCK_N <= 128 (<= 256 gated).
    """
    K_BLOCKS: tl.constexpr = (K + 127) // 128
    if GATED:
        UP_BLOCKS: tl.constexpr = (N // 2 + 127) // 128
        gate = tl.load(scale_ptr + n0 // 256 * K_BLOCKS + k_block)
        up = tl.load(scale_ptr + (UP_BLOCKS + n0 // 256) * K_BLOCKS + k_block)
        return tl.where(tl.arange(0, BLOCK_N) % 2 == 0, gate, up)
    else:
        return tl.load(scale_ptr + n0 // 128 * K_BLOCKS + k_block) + tl.zeros((BLOCK_N,), tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def prefill_fp8_block_kernel(
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
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    """As `prefill.prefill_kernel`; x_scale_ptr: float32 [rows of x, ceil(K/128)]."""
    tl.static_assert(BLOCK_K == 128)
    NUM_COLUMN_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    K_BLOCKS: tl.constexpr = (K + 127) // 128
    ks = tl.arange(0, BLOCK_K)
    num_row_tiles = tl.load(tiles_ptr).to(tl.int32)
    if not GATHER:
        x_desc = tl.make_tensor_descriptor(x_ptr, [num_rows, K], [X_STRIDE, 1], [BLOCK_R, BLOCK_K])
    for index in tl.range(tl.program_id(0), num_row_tiles * NUM_COLUMN_TILES, NUM_PROGRAMS, flatten=False):
        row_tile, column_tile = banded(index, num_row_tiles, NUM_COLUMN_TILES, GROUP)
        address, row, end = load_tile(tiles_ptr, row_tile)
        n0 = column_tile * BLOCK_N
        w_ptr = (address + WEIGHT_OFFSET).to(tl.pointer_type(x_ptr.dtype.element_ty))
        w_desc = tl.make_tensor_descriptor(w_ptr, [N, K_STORED], [K_STORED, 1], [BLOCK_N, BLOCK_K])
        w_scale_ptr = (address + SCALE_OFFSET).to(tl.pointer_type(tl.float32))
        rows = row + tl.arange(0, BLOCK_R)
        valid = rows < end
        if GATHER:
            source = tl.load(token_rows_ptr + rows, mask=valid, other=0).to(tl.int64)
            x_ptrs = x_ptr + source[:, None] * X_STRIDE + ks[None, :]
        else:
            source = tl.where(valid, rows, row)
        x_scale_ptrs = x_scale_ptr + source * K_BLOCKS
        acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for k_block in range(K_BLOCKS):
            k = k_block * BLOCK_K
            if not GATHER:
                x = x_desc.load([row, k])
            elif K % BLOCK_K == 0:
                x = tl.load(x_ptrs + k)
            else:
                x = tl.load(x_ptrs + k, mask=(ks < K - k)[None, :], other=0.0)
            w = w_desc.load([n0, k])
            x_scale = tl.load(x_scale_ptrs + k_block)
            w_scale = block_scales(w_scale_ptr, n0, k_block, N, K, GATED, BLOCK_N)
            acc += tl.dot(x, w.T) * (x_scale[:, None] * w_scale[None, :])
        store_rows(
            acc, None, out_ptr, rows, valid, n0, address, N, OUT_STRIDE, -1, BIAS_OFFSET,
            ACTIVATION, GATED, LIMIT, UP_SHIFT, BLOCK_R, BLOCK_N,
        )  # fmt: skip
