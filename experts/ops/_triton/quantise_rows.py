"""Activations to fp8 (e4m3) on the way into a grouped matmul: one scale a row, or one for 128 columns of a row."""

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

LARGEST = tl.constexpr(448.0)


@triton.jit
def quantise_rows_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    X_STRIDE: tl.constexpr,
    K: tl.constexpr,
    K_STORED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A program quantises BLOCK_G groups of GROUP columns of one row; the columns between K and K_STORED become 0."""
    row = tl.program_id(0).to(tl.int64)
    groups_G = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    columns = groups_G[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + row * X_STRIDE + columns, mask=columns < K, other=0.0).to(tl.float32)
    largest_G = tl.max(tl.abs(x), 1)
    scale_G = tl.where(largest_G == 0.0, 1.0, largest_G / LARGEST)
    scale_G = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale_G)  # tl.max drops NaN
    codes = (x / scale_G[:, None]).to(code_ptr.dtype.element_ty)
    tl.store(code_ptr + row * K_STORED + columns, codes, mask=columns < K_STORED)
    tl.store(scale_ptr + row * NUM_GROUPS + groups_G, scale_G, mask=groups_G < NUM_GROUPS)


def quantise_rows(x_RK: torch.Tensor, *, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes float8_e4m3fn [R, K up to a multiple of 128], scales float32) with `x = codes * scale`.

    group: 128 for scales [R, ceil(K/128)]; None for one scale a row, [R]. x_RK: rows may be strided, columns not.
    """
    num_rows, k = x_RK.shape
    k_stored = triton.cdiv(k, 128) * 128
    num_groups = triton.cdiv(k, 128) if group else 1
    width = group or triton.next_power_of_2(k_stored)
    block_groups = min(16, triton.next_power_of_2(num_groups))
    codes = torch.empty((num_rows, k_stored), dtype=torch.float8_e4m3fn, device=x_RK.device)
    scales = torch.empty((num_rows, num_groups), dtype=torch.float32, device=x_RK.device)
    quantise_rows_kernel[(num_rows, triton.cdiv(num_groups, block_groups))](
        x_RK,
        codes,
        scales,
        X_STRIDE=x_RK.stride(0),
        K=k,
        K_STORED=k_stored,
        NUM_GROUPS=num_groups,
        GROUP=width,
        BLOCK_G=block_groups,
        num_warps=8 if group is None else 4,
    )
    return codes, scales if group else scales.view(-1)


def quantise_rows_reference(x_RK: torch.Tensor, *, group: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantise_rows` in torch."""
    x = F.pad(x_RK.float(), (0, -x_RK.shape[1] % 128))
    groups = x.view(len(x), -1, group) if group else x.view(len(x), 1, -1)
    largest = groups.abs().amax(2)
    scales = torch.where(largest == 0, 1.0, largest / LARGEST.value)
    codes = (groups / scales[:, :, None]).view(x.shape).to(torch.float8_e4m3fn)
    return codes, scales if group else scales.view(-1)
