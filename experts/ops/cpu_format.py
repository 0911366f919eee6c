"""How an expert's matrices are held on CPU: the names of `model.quantization` that need no GPU."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping

import torch

from experts.errors import ConfigError
from experts.ops.packed_matmul import PackedMatrix, pack_matrix

_INT8_STEPS = 127


def as_stored(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> PackedMatrix:
    """In the checkpoint's own dtype: nothing is lost. What no CPU multiplies (float8) in float32."""
    if weight_OI.dtype not in (torch.bfloat16, torch.float16) or (weight_OI.dtype is torch.float16 and not has_fp16()):
        weight_OI = weight_OI.float()
    return pack_matrix(weight_OI, bias_O)


def as_fp16(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> PackedMatrix:
    """In float16: rounds a float32 weight by 2e-4 (root mean square), 3.6e-4 of an expert's output.

    Raises ConfigError for weights beyond float16's range.
    """
    largest = weight_OI.float().abs().amax().item()
    if largest > torch.finfo(torch.float16).max:
        raise ConfigError(
            f"model.quantization: fp16 ends at 65504, but a weight of this checkpoint is {largest:g}; use none"
        )
    return pack_matrix(weight_OI.half(), bias_O)


def as_int8(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> PackedMatrix:
    """In int8 with one scale for each output: a weight moves by at most 1/254 of its output's largest.

    Rows stay in float32, or become 16-bit steps of their largest value where the CPU multiplies bytes or pairs of them
    (3e-5 of an output). For normally distributed weights that is a relative error of about 1 % of an expert's output.
    """
    weight = weight_OI.float()
    scale_O = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / _INT8_STEPS
    return pack_matrix((weight / scale_O[:, None]).round().to(torch.int8), bias_O, scale_O=scale_O)


def has_fp16() -> bool:
    """Whether this CPU widens float16 by itself: every ARM of 64 bits, and x86 since AVX2."""
    return "x86" not in platform.machine().lower() or torch.backends.cpu.get_cpu_capability() != "DEFAULT"


FORMATS: Mapping[str, Callable[[torch.Tensor, torch.Tensor | None], PackedMatrix]] = {
    "none": as_stored,
    "fp16": as_fp16,
    "int8": as_int8,
}


def check_cpu_quantization(quantization: str) -> None:
    """Raises ConfigError for a `model.quantization` that this CPU does not have."""
    if quantization not in FORMATS:
        raise ConfigError(f"model.quantization: {quantization!r} needs a GPU; on CPU use one of {', '.join(FORMATS)}")
    if quantization == "fp16" and not has_fp16():
        raise ConfigError("model.quantization: fp16 on this CPU needs AVX2; use none or int8")
