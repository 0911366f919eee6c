"""Grouped matmul for many rows an expert: persistent, banded, weights through TMA.

Operands are of one dtype (bf16, fp16, fp8 with row scales). A program walks tiles of [BLOCK_R, BLOCK_N] in bands of
GROUP row tiles, so that the programs running at one time share weights and rows in L2. Rows are gathered by pointer
(the up projection reads tokens) or read through TMA (the down projection reads the up projection's rows);
`descriptor.gather` does not assemble for sm_90.
"""

import triton
import triton.language as tl

from experts.ops._triton.epilogue import store_rows
from experts.ops._triton.tiles import load_tile


@triton.jit
def banded(index, num_row_tiles, NUM_COLUMN_TILES: tl.constexpr, GROUP: tl.constexpr):
    """Row tile and column tile of the index-th tile: bands of GROUP row tiles, columns outermost in a band."""
    band = index // (GROUP * NUM_COLUMN_TILES)
    within = index % (GROUP * NUM_COLUMN_TILES)
    height = tl.minimum(num_row_tiles - band * GROUP, GROUP)
    return band * GROUP + within % height, within // height


@triton.jit(do_not_specialize=["num_rows"])
def prefill_kernel(
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
    """`out[r] = epilogue(x[token_rows[r]] @ W[slot of r].T)`; without GATHER `x[r]`. See `grouped_matmul`."""
    NUM_COLUMN_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
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
        rows = row + tl.arange(0, BLOCK_R)
        valid = rows < end
        if GATHER:
            source = tl.load(token_rows_ptr + rows, mask=valid, other=0).to(tl.int64)
            x_ptrs = x_ptr + source[:, None] * X_STRIDE + ks[None, :]
        else:
            source = rows
        acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            if not GATHER:
                x = x_desc.load([row, k])
            elif K % BLOCK_K == 0:
                x = tl.load(x_ptrs + k)
            else:
                x = tl.load(x_ptrs + k, mask=(ks < K - k)[None, :], other=0.0)
            w = w_desc.load([n0, k])
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
        if x_scale_ptr is not None:
            row_scale = tl.load(x_scale_ptr + source, mask=valid, other=0.0)
        else:
            row_scale = None
        store_rows(
            acc, row_scale, out_ptr, rows, valid, n0, address, N, OUT_STRIDE, SCALE_OFFSET, BIAS_OFFSET,
            ACTIVATION, GATED, LIMIT, UP_SHIFT, BLOCK_R, BLOCK_N,
        )  # fmt: skip
