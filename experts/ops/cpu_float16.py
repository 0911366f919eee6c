"""A matrix in float16, widened inside the multiplication (FBGEMM); sums are float32."""

from __future__ import annotations

import torch

from experts.errors import ConfigError
from experts.ops.cpu_float32 import Float32Linear

_FLOAT32_ROUNDING = 2.0**-24


class Float16Linear:
    """Half the bytes of float32.

    Rounding a float32 weight to float16 is a relative error of 2e-4 a matrix (root mean square), and 3.6e-4 of an
    expert's output; a float16 weight loses nothing and a bfloat16 one next to nothing (see `holds_exactly`).

    Raises ConfigError for weights beyond float16's range.
    """

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        largest = weight_OI.float().abs().amax().item()
        if largest > torch.finfo(torch.float16).max:
            raise ConfigError(
                f"model.quantization: fp16 ends at 65504, but a weight of this checkpoint is {largest:g}; use none"
            )
        bias = None if bias_O is None else bias_O.float()
        self._weight = torch.ops.quantized.linear_prepack_fp16(weight_OI.float().contiguous(), bias)
        self.nbytes = weight_OI.numel() * 2

    def __call__(self, rows_RI: torch.Tensor) -> torch.Tensor:
        """float32 [R, I] to float32 [R, O]."""
        out_RO: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16.default(rows_RI, self._weight)
        return out_RO

    @staticmethod
    def is_supported() -> bool:
        """Whether this CPU and this torch have it (x86 with AVX2)."""
        return "fbgemm" in torch.backends.quantized.supported_engines

    @staticmethod
    def holds_exactly(weight_OI: torch.Tensor) -> bool:
        """Whether float16 keeps a matrix as well as float32 arithmetic keeps anything (2^-24 of its norm).

        bfloat16 has fewer digits than float16 and only its range is larger: values below 2^-17 lose digits, which
        in a trained matrix are few and small.
        """
        weight = weight_OI.float()
        lost = (weight.half().float() - weight).norm()
        return bool(lost <= _FLOAT32_ROUNDING * weight.norm())


def lossless_linear(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Float32Linear | Float16Linear:
    """The smaller format that loses nothing: float16 for float16 and bfloat16 checkpoints, else float32."""
    if weight_OI.dtype is not torch.float32 and Float16Linear.is_supported() and Float16Linear.holds_exactly(weight_OI):
        return Float16Linear(weight_OI, bias_O)
    return Float32Linear(weight_OI, bias_O)
