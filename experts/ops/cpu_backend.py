"""Experts on CPU cores: weights packed at load, arithmetic in float32 whatever the checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experts.errors import ConfigError
from experts.ops.activations import activate
from experts.ops.cpu_format import FORMATS, has_fp16
from experts.ops.cpu_threads import ThreadTeam
from experts.ops.packed_matmul import PackedMatrix, packed_matmul
from experts.ops.unpermute import unpermute
from experts.quant.fp8_block import Fp8Block
from experts.quant.scheme import QuantisedWeight
from experts.spec import ExpertSpec, ExpertWeights

# Reading an expert's matrices takes as long as multiplying so many rows with them, in any format.
_READ_ROWS = 12
# Rows (and reads) of a task: beyond, what lies between the matrices leaves the cache.
_MOST_ROWS = 160
# Rows of one expert below which its task is not split.
_LEAST_ROWS = 64
# Work that reads so many bytes is done before another thread is awake.
_ALONE_BYTES = 16 << 20


@dataclass(slots=True)
class _Task:
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
        if quantization == "fp16" and not has_fp16():
            raise ConfigError("model.quantization: fp16 on this CPU needs AVX2; use none or int8")
        self._spec = spec
        self._pack = FORMATS[quantization]
        self._num_threads = num_threads
        self._team = ThreadTeam(num_threads)
        self._slots: dict[int, tuple[PackedMatrix, PackedMatrix]] = {}

    def load(self, slot: int, weights: ExpertWeights) -> None:
        """Pack one expert; float8 weights with block scales are widened first."""
        up = _widen(weights.up_2IH, weights.up_scale)
        down = _widen(weights.down_HI, weights.down_scale)
        self._slots[slot] = (self._pack(up, weights.up_bias_2I), self._pack(down, weights.down_bias_H))

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
        if not len(token_rows_R):
            return torch.zeros(len(hidden_TH), spec.hidden_size)
        tasks = self._tasks(slots_S.tolist(), offsets_S1.tolist())
        out_RH = tasks[0].downs[0].new_result(len(token_rows_R))

        def run(index: int) -> None:
            task = tasks[index]
            rows = hidden_TH.index_select(0, token_rows_R[task.first : task.last])
            inner = activate(packed_matmul(task.ups, rows, task.counts), spec)
            packed_matmul(task.downs, inner, task.counts, out_RH[task.first : task.last])

        self._team.run(run, len(tasks))
        return unpermute(out_RH, token_rows_R, weights_R, len(hidden_TH))

    def _tasks(self, slots: list[int], offsets: list[int]) -> list[_Task]:
        """Work in pieces of like size: two for each thread, or more where there is much; one where there is little."""
        total = _READ_ROWS * len(slots) + offsets[-1]
        alone = self._num_threads == 1 or total / _READ_ROWS * self.nbytes(slots[0]) < _ALONE_BYTES
        enough = _MOST_ROWS if alone else min(_MOST_ROWS, total / (2 * self._num_threads))
        most = max(_LEAST_ROWS, int(enough))
        tasks: list[_Task] = []
        size = enough
        for slot, start, end in zip(slots, offsets, offsets[1:], strict=False):
            up, down = self._slots[slot]
            rows = end - start
            pieces = -(-rows // most)
            for piece in range(pieces):
                first, last = start + rows * piece // pieces, start + rows * (piece + 1) // pieces
                cost = _READ_ROWS + last - first
                if size + cost / 2 > enough or up.panels.dtype is not tasks[-1].ups[0].panels.dtype:
                    tasks.append(_Task(first, last, [], [], []))
                    size = 0
                task = tasks[-1]
                task.last = last
                task.counts.append(last - first)
                task.ups.append(up)
                task.downs.append(down)
                size += cost
        return tasks


def _widen(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return weight
    return Fp8Block().dequantise(QuantisedWeight(weight, scale), weight.shape[1])
