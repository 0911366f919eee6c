"""Grouped matmul: the kernels of each quantisation scheme behind one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl

from experts.ops._triton.decode import decode_kernel
from experts.ops._triton.decode_fp8_block import decode_fp8_block_kernel
from experts.ops._triton.decode_int4 import decode_int4_kernel
from experts.ops._triton.prefill import prefill_kernel
from experts.ops._triton.prefill_fp8_block import prefill_fp8_block_kernel
from experts.ops._triton.quantise_rows import quantise_rows
from experts.ops.projection import Projection
from experts.ops.tile_config import TileConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SchemeKernels:
    """What runs a scheme.

    prefill:    None where the decode kernel serves any number of rows (weights widened in registers)
    activation_group: None: activations keep their dtype; `row` or 128: quantised to fp8 with such scales
    """

    decode: Any
    prefill: Any = None
    activation_group: Literal["row", 128] | None = None


KERNELS: Mapping[str, SchemeKernels] = {
    "none": SchemeKernels(prefill=prefill_kernel, decode=decode_kernel),
    "fp8": SchemeKernels(prefill=prefill_kernel, decode=decode_kernel, activation_group="row"),
    "fp8_block": SchemeKernels(prefill=prefill_fp8_block_kernel, decode=decode_fp8_block_kernel, activation_group=128),
    "int8": SchemeKernels(decode=decode_kernel),
    "int4": SchemeKernels(decode=decode_int4_kernel),
}

TRITON_DTYPES: Mapping[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.uint8: tl.uint8,
}


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the card; 4 for the interpreter, which has no card."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def constants(
    projection: Projection, config: TileConfig, weight_dtype: torch.dtype, x_stride: int, out_stride: int
) -> dict[str, Any]:
    """The compile-time arguments that both kinds of kernel share, and those of `config`'s kind."""
    shared = {
        "N": projection.n,
        "K": projection.k,
        "K_STORED": projection.k_stored,
        "X_STRIDE": x_stride,
        "OUT_STRIDE": out_stride,
        "WEIGHT_OFFSET": projection.weight_offset,
        "SCALE_OFFSET": projection.scale_offset,
        "BIAS_OFFSET": projection.bias_offset,
        "ACTIVATION": projection.activation,
        "GATED": projection.gated,
        "LIMIT": projection.limit,
        "UP_SHIFT": projection.up_shift,
        "GATHER": projection.gather,
        "BLOCK_R": config.rows,
        "BLOCK_N": config.columns,
        "BLOCK_K": config.depth,
    }
    if config.kernel == "prefill":
        return shared | {"GROUP": config.band}
    return shared | {"WEIGHT_DTYPE": TRITON_DTYPES[weight_dtype]}


def grouped_matmul(
    scheme: str,
    projection: Projection,
    config: TileConfig,
    weight_dtype: torch.dtype,
    x: torch.Tensor,
    token_rows_R: torch.Tensor,
    tiles: torch.Tensor,
    out_RN: torch.Tensor,
) -> None:
    """Writes `out_RN[r] = act(x[token_rows_R[r]] @ W.T + b)` with the weights of r's slot; no host sync.

    x: [T, k] (gather) or [R, k] (else), bf16, fp16 or float32 (slow); rows at multiples of 16 bytes.
    tiles: `tile_table` for rows of `config.rows`. out_RN: [R, projection.out_columns]; rows of no tile stay as is.
    """
    kernels = KERNELS[scheme]
    x_scale = None
    if kernels.activation_group is not None:
        x, x_scale = quantise_rows(x, group=None if kernels.activation_group == "row" else 128)
    arguments = (x, x_scale, token_rows_R, tiles, out_RN, x.shape[0])
    shared = constants(projection, config, weight_dtype, x.stride(0), out_RN.stride(0))
    column_tiles = triton.cdiv(projection.n, config.columns)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    bound = tiles.shape[0] - 1
    if config.kernel == "decode":
        kernels.decode[(column_tiles, bound)](*arguments, **shared, **options)
        return
    triton.set_allocator(scratch(x.device))
    programs = multiprocessors(x.device) * config.programs_per_sm
    kernels.prefill[(programs,)](*arguments, **shared, NUM_PROGRAMS=programs, **options)


@cache
def scratch(device: torch.device) -> Callable[[int, int, int | None], torch.Tensor]:
    """Where a kernel builds its TMA descriptors. Triton keeps the allocator per context, so each launch sets it."""

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    return allocate
