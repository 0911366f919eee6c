"""Experts on CPU cores: weights packed at load, arithmetic in float32 whatever the checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from experts.errors import ConfigError
from experts.ops.activations import activate
from experts.ops.cpu_float16 import Float16Linear, lossless_linear
from experts.ops.cpu_format import CpuFormat, FloatFormat, PackedMatrix
from experts.ops.cpu_int8 import Int8Format
from experts.ops.cpu_threads import ThreadTeam
from experts.ops.unpermute import unpermute
from experts.quant.fp8_block import Fp8Block
from experts.quant.scheme import QuantisedWeight
from experts.spec import ExpertSpec, ExpertWeights

FORMATS: Mapping[str, Callable[[], CpuFormat]] = {
    "none": lambda: FloatFormat(lossless_linear),
    "fp16": lambda: FloatFormat(Float16Linear),
    "int8": Int8Format,
}

# Reading an expert's matrices takes as long as multiplying so many rows with them, in any format.
_READ_ROWS = 12
# Rows (and reads) of a task: beyond, what lies between the matrices leaves the cache.
_MOST_ROWS = 160
# Rows of one expert below which its task is not split.
_LEAST_ROWS = 64
# Work that reads so many bytes is done before another thread is awake.
_ALONE_BYTES = 16 << 20


class _Task(NamedTuple):
    """Neighbouring experts, and the routed rows `first:last` that are theirs."""

    first: int
    last: int
    counts: list[int]
    ups: list[PackedMatrix]
    downs: list[PackedMatrix]


class CpuBackend:
    """An ExpertBackend (see backend.py) for CPU.

    quantization: a key of FORMATS.
    num_threads: cores that one call may use.

    Raises ConfigError for a quantization that this CPU does not have.
    """

    device = torch.device("cpu")

    def __init__(self, spec: ExpertSpec, *, quantization: str = "none", num_threads: int = 1) -> None:
        if quantization not in FORMATS:
            raise ConfigError(
                f"model.quantization: {quantization!r} needs a GPU; on CPU use one of {', '.join(FORMATS)}"
            )
        if quantization == "fp16" and not Float16Linear.is_supported():
            raise ConfigError("model.quantization: fp16 on CPU needs x86 with AVX2; use none or int8")
        if quantization == "int8" and not Int8Format.is_supported():
            raise ConfigError("model.quantization: int8 on CPU needs a torch with oneDNN; use none or fp16")
        self._spec = spec
        self._format: CpuFormat = FORMATS[quantization]()
        self._num_threads = num_threads
        self._team = ThreadTeam(num_threads)
        self._slots: dict[int, tuple[PackedMatrix, PackedMatrix]] = {}

    def load(self, slot: int, weights: ExpertWeights) -> None:
        """Pack one expert; float8 weights with block scales are widened first."""
        up = _widen(weights.up_2IH, weights.up_scale)
        down = _widen(weights.down_HI, weights.down_scale)
        self._slots[slot] = (self._format.pack(up, weights.up_bias_2I), self._format.pack(down, weights.down_bias_H))

    def free(self, slot: int) -> None:
        """Forget `slot`."""
        del self._slots[slot]

    def use_threads(self, num_threads: int) -> None:
        """Calls from now on use so many cores; one that runs goes on with those that it has."""
        if num_threads != self._num_threads:
            self._num_threads, self._team = num_threads, ThreadTeam(num_threads)

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
            first, last, counts, ups, downs = tasks[index]
            with torch.inference_mode():  # a mode is its thread's own, and out_RH may have been made in it
                rows = hidden_TH.index_select(0, token_rows_R[first:last])
                inner = activate(self._format.multiply(ups, rows, counts), spec)
                out_RH[first:last] = self._format.multiply(downs, inner, counts)

        self._team.run(run, len(tasks))
        return unpermute(out_RH, token_rows_R, weights_R, len(hidden_TH))

    def _tasks(self, slots: list[int], offsets: list[int]) -> list[_Task]:
        """Work in pieces of like size: two for each thread, or more where there is much."""
        total = _READ_ROWS * len(slots) + offsets[-1]
        alone = self._num_threads == 1 or not slots or total / _READ_ROWS * self.nbytes(slots[0]) < _ALONE_BYTES
        enough = _MOST_ROWS if alone else min(_MOST_ROWS, total / (2 * self._num_threads))
        tasks: list[_Task] = []
        size = enough
        for slot, start, end in zip(slots, offsets, offsets[1:], strict=False):
            up, down = self._slots[slot]
            pieces = -(-(end - start) // max(_LEAST_ROWS, int(enough)))
            for piece in range(pieces):
                first = start + (end - start) * piece // pieces
                last = start + (end - start) * (piece + 1) // pieces
                cost = _READ_ROWS + last - first
                if size + cost / 2 > enough:
                    tasks.append(_Task(first, last, [], [], []))
                    size = 0
                task = tasks[-1]._replace(last=last)
                task.counts.append(last - first)
                task.ups.append(up)
                task.downs.append(down)
                tasks[-1] = task
                size += cost
        return tasks


def _widen(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return weight
    return Fp8Block().dequantise(QuantisedWeight(weight, scale), weight.shape[1])
