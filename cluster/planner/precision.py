"""How many bytes an expert takes under each quantisation, scales included."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cluster.planner.architecture import Architecture
from cluster.planner.hardware import Gpu
from experts.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """weight_bits of each weight, and the bytes of the scales of a [rows, columns] matrix."""

    name: str
    weight_bits: int
    scale_bytes: Callable[[int, int], int]


def _no_scales(rows: int, columns: int) -> int:
    return 0


def _block_scales(rows: int, columns: int) -> int:
    """One float32 for each 128 x 128 block, as in DeepSeek-V3's checkpoints."""
    return 4 * math.ceil(rows / 128) * math.ceil(columns / 128)


def _row_scales(rows: int, columns: int) -> int:
    """One float32 for each output row."""
    return 4 * rows


def _group_scales(rows: int, columns: int) -> int:
    """One float32 for each group of 128 weights of a row."""
    return 4 * rows * math.ceil(columns / 128)


# The names of `model.quantization` in mesh.yaml, and the widths that a checkpoint itself may have.
SCHEMES = {
    "fp8": Scheme(name="fp8", weight_bits=8, scale_bytes=_block_scales),
    "int8": Scheme(name="int8", weight_bits=8, scale_bytes=_row_scales),
    "int4": Scheme(name="int4", weight_bits=4, scale_bytes=_group_scales),
    "fp16": Scheme(name="fp16", weight_bits=16, scale_bytes=_no_scales),
    "bf16": Scheme(name="bf16", weight_bits=16, scale_bytes=_no_scales),
    "float32": Scheme(name="float32", weight_bits=32, scale_bytes=_no_scales),
}
QUANTIZATIONS = ("none", "fp8", "int8", "int4", "fp16")


def expert_scheme(architecture: Architecture, quantization: str, gpu: Gpu) -> Scheme:
    """What experts are held in. `none` keeps the checkpoint's own precision; where that is fp8 and the card
    has no fp8 units, weights are widened to bf16.

    Raises ConfigError: an unknown name, or fp8 asked of a card without it.
    """
    if quantization not in QUANTIZATIONS:
        raise ConfigError(f"--quantization {quantization}: use one of {', '.join(QUANTIZATIONS)}")
    if quantization == "fp8" and gpu.fp8_flops is None:
        raise ConfigError(f"--quantization fp8: {gpu.name} has no fp8 units; use int8, or a card that has them")
    if quantization != "none":
        return SCHEMES[quantization]
    if architecture.checkpoint_scheme == "fp8" and gpu.fp8_flops is not None:
        return SCHEMES["fp8"]
    return SCHEMES["float32" if architecture.dtype_bytes == 4 else "bf16"]


def expert_bytes(architecture: Architecture, scheme: Scheme) -> int:
    """Bytes of one expert of one layer. Biases stay at the model's precision."""
    matrices = architecture.expert_matrices
    weights = sum(rows * columns for rows, columns in matrices)
    biases = architecture.expert_parameters - weights
    scales = sum(scheme.scale_bytes(rows, columns) for rows, columns in matrices)
    return weights * scheme.weight_bits // 8 + scales + biases * architecture.dtype_bytes
