"""Experts on CPU cores: weights packed at load, arithmetic in float32 whatever the checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from experts.errors import ConfigError
from experts.ops.activations import activate
from experts.ops.cpu_float16 import Float16Linear, lossless_linear
from experts.ops.cpu_int8 import Int8Linear
from experts.ops.cpu_linear import CpuLinear
from experts.ops.cpu_threads import ThreadTeam
from experts.ops.unpermute import unpermute
from experts.quant.fp8_block import Fp8Block
from experts.quant.scheme import QuantisedWeight
from experts.spec import ExpertSpec, ExpertWeights

SCHEMES: Mapping[str, Callable[[torch.Tensor, torch.Tensor | None], CpuLinear]] = {
    "none": lossless_linear,
    "fp16": Float16Linear,
    "int8": Int8Linear,
}

# Rows of one expert that one thread multiplies at a time: enough for full speed, few enough to share.
_MIN_TASK_ROWS = 64


class CpuBackend:
    """An ExpertBackend (see backend.py) for CPU.

    quantization: a key of SCHEMES.
    num_threads: cores that one call may use.

    Raises ConfigError for a quantization that this CPU does not have.
    """

    device = torch.device("cpu")

    def __init__(self, spec: ExpertSpec, *, quantization: str = "none", num_threads: int = 1) -> None:
        if quantization not in SCHEMES:
            raise ConfigError(
                f"model.quantization: {quantization!r} needs a GPU; on CPU use one of {', '.join(SCHEMES)}"
            )
        if quantization == "fp16" and not Float16Linear.is_supported():
            raise ConfigError("model.quantization: fp16 on CPU needs x86 with AVX2; use none or int8")
        self._spec = spec
        self._pack = SCHEMES[quantization]
        self._num_threads = num_threads
        self._team = ThreadTeam(num_threads)
        self._slots: dict[int, tuple[CpuLinear, CpuLinear]] = {}

    def load(self, slot: int, weights: ExpertWeights) -> None:
        """Pack one expert; float8 weights with block scales are widened first."""
        up = _widen(weights.up_2IH, weights.up_scale)
        down = _widen(weights.down_HI, weights.down_scale)
        self._slots[slot] = (self._pack(up, weights.up_bias_2I), self._pack(down, weights.down_bias_H))

    def free(self, slot: int) -> None:
        """Forget `slot`."""
        del self._slots[slot]

    def nbytes(self, slot: int) -> int:
        """Bytes that a slot's matrices take, and that a call of one row reads."""
        up, down = self._slots[slot]
        return up.nbytes + down.nbytes

    def forward(
        self,
        hidden_TH: torch.Tensor,
        slots_S: torch.Tensor,
        offsets_S1: torch.Tensor,
        token_rows_R: torch.Tensor,
        weights_R: torch.Tensor,
    ) -> torch.Tensor:
        """See ExpertBackend.forward."""
        spec = self._spec
        hidden_TH = hidden_TH.float()
        out_RH = torch.empty(len(token_rows_R), spec.hidden_size)
        tasks = self._tasks(slots_S.tolist(), offsets_S1.tolist())

        def run(index: int) -> None:
            _, start, end, (up, down) = tasks[index]
            rows = hidden_TH.index_select(0, token_rows_R[start:end])
            out_RH[start:end] = down(activate(up(rows), spec))

        self._team.run(run, len(tasks))
        return unpermute(out_RH, token_rows_R, weights_R, len(hidden_TH))

    def _tasks(self, slots: list[int], offsets: list[int]) -> list[tuple[int, int, int, tuple[CpuLinear, CpuLinear]]]:
        """(rows, first row, end, the slot's matrices) of every task, largest first so that none is left to the end."""
        share = max(_MIN_TASK_ROWS, -(-offsets[-1] // (2 * self._num_threads)))
        tasks = []
        for slot, start, end in zip(slots, offsets, offsets[1:], strict=False):
            linears = self._slots[slot]
            pieces = -(-(end - start) // share)
            for piece in range(pieces):
                first = start + (end - start) * piece // pieces
                last = start + (end - start) * (piece + 1) // pieces
                tasks.append((last - first, first, last, linears))
        if self._num_threads > 1:
            tasks.sort(key=lambda task: -task[0])
        return tasks


def _widen(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return weight
    return Fp8Block().dequantise(QuantisedWeight(weight, scale), weight.shape[1])
