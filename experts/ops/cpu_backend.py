"""Experts on CPU cores: weights packed at load, arithmetic in float32 whatever the checkpoint holds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from experts.ops.cpu_format import FORMATS, check_cpu_quantization
from experts.ops.cpu_threads import ThreadTeam
from experts.ops.packed_matmul import ROWS_A_READ, PackedMatrix
from experts.ops.unpermute import compiled_unpermute
from experts.quant.fp8_block import Fp8Block
from experts.quant.scheme import QuantisedWeight
from experts.spec import ExpertSpec, ExpertWeights

# Rows (and reads) of a task: beyond, what lies between the matrices leaves the cache.
MOST_ROWS = 160
# Rows of one expert below which its task is not split.
_LEAST_ROWS = 64
# Work that reads so many bytes is done before another thread is awake.
_ALONE_BYTES = 16 << 20

# What `experts.ops._numba.expert_mlp` is compiled for besides the spec: formats of up and of down.
Formats = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Slot:
    """An expert's matrices, and what compiled code wants to know of them: formats, and addresses of up's and down's."""

    up: PackedMatrix
    down: PackedMatrix
    formats: Formats
    addresses: tuple[int, ...]


@dataclass(slots=True)
class _Task:
    """Neighbouring experts of the same formats: their slots, and where each one's rows start and the last one's end."""

    formats: Formats
    slots: list[int]
    starts: list[int]


class CpuBackend:
    """An ExpertBackend (see backend.py) for CPU.

    quantization: a key of FORMATS.
    num_threads: cores that one call may use.

    Raises ConfigError for a quantization that this CPU does not have.
    """

    device = torch.device("cpu")

    def __init__(self, spec: ExpertSpec, *, quantization: str = "none", num_threads: int = 1) -> None:
        check_cpu_quantization(quantization)
        self.spec = spec
        self._limit = float("inf") if spec.limit is None else spec.limit
        self._pack = FORMATS[quantization]
        self._team = ThreadTeam(num_threads)
        self._slots: dict[int, Slot] = {}
        self._compiled: dict[Formats, Callable[..., None]] = {}

    def load(self, slot: int, weights: ExpertWeights) -> None:
        """Pack one expert; float8 weights with block scales are widened first."""
        spec = self.spec
        up = _widen(weights.up_2IH, weights.up_scale)
        down = _widen(weights.down_HI, weights.down_scale)
        # Compiled code reads as many bytes as the spec says.
        assert up.shape == (spec.intermediate_size * (2 if spec.gated else 1), spec.hidden_size)
        assert down.shape == (spec.hidden_size, spec.intermediate_size)
        assert (weights.up_bias_2I is not None) == (weights.down_bias_H is not None) == spec.bias
        # Loads LLVM, which a process without experts on CPU does not need.
        from experts.ops._numba.expert_mlp import compile_expert_mlp

        packed_up, packed_down = self._pack(up, weights.up_bias_2I), self._pack(down, weights.down_bias_H)
        formats = packed_up.format, packed_down.format
        if formats not in self._compiled:
            compiled_unpermute()
            self._compiled[formats] = compile_expert_mlp(
                spec.activation, gated=spec.gated, biased=spec.bias, up_format=formats[0], down_format=formats[1]
            )
        addresses = (*packed_up.addresses(), *packed_down.addresses())
        self._slots[slot] = Slot(packed_up, packed_down, formats, addresses)

    def free(self, slot: int) -> None:
        """Forget `slot`."""
        del self._slots[slot]

    def use_threads(self, num_threads: int) -> None:
        """Calls from now on use so many cores; one that runs goes on with those that it has."""
        if num_threads != self._team.num_threads:
            self._team = ThreadTeam(num_threads)

    def slot(self, slot: int) -> Slot:
        """What is in `slot`."""
        return self._slots[slot]

    def most_work_alone(self, expert_bytes: int) -> int:
        """Rows, and ROWS_A_READ for each expert of so many bytes, that are done before another thread is awake."""
        return sys.maxsize if self._team.num_threads == 1 else _ALONE_BYTES * ROWS_A_READ // expert_bytes

    def nbytes(self, slot: int) -> int:
        """Bytes that a slot's matrices take, and that a call of one row reads."""
        held = self._slots[slot]
        return held.up.nbytes + held.down.nbytes

    def forward(
        self,
        hidden_TH: torch.Tensor,
        slots_S: torch.Tensor,
        offsets_S1: torch.Tensor,
        token_rows_R: torch.Tensor,
        weights_R: torch.Tensor,
    ) -> torch.Tensor:
        """See ExpertBackend.forward."""
        if not len(token_rows_R):
            return torch.zeros(len(hidden_TH), self.spec.hidden_size)
        tasks = self._tasks(slots_S.tolist(), offsets_S1.tolist())
        spec, some = self.spec, self._slots[tasks[0].slots[0]]
        tokens, token_rows = hidden_TH.float().contiguous().numpy(), token_rows_R.numpy()
        out_RP = np.empty((len(token_rows), some.down.num_columns), np.float32)

        def run(index: int) -> None:
            task = tasks[index]
            num_rows = task.starts[-1] - task.starts[0]
            self._compiled[task.formats](
                np.array([self._slots[slot].addresses for slot in task.slots]).T.copy(),
                np.array([len(some.up.panels), len(some.down.panels)]),
                np.array(task.starts),
                tokens,
                token_rows,
                self._limit,
                spec.up_shift,
                np.empty((num_rows, spec.hidden_size), np.float32),
                np.empty((num_rows, some.up.num_columns), np.float32),
                np.empty((num_rows, spec.intermediate_size), np.float32),
                out_RP,
            )

        self._team.run(run, len(tasks))
        partial_TH = np.zeros((hidden_TH.shape[0], spec.hidden_size), np.float32)
        compiled_unpermute()(out_RP, token_rows, weights_R.numpy(), partial_TH)
        return torch.from_numpy(partial_TH)

    def _tasks(self, slots: list[int], offsets: list[int]) -> list[_Task]:
        """Work in pieces of like size: two for each thread, or more where there is much; one where there is little."""
        total = ROWS_A_READ * len(slots) + offsets[-1]
        alone = self._team.num_threads == 1 or total / ROWS_A_READ * self.nbytes(slots[0]) < _ALONE_BYTES
        enough = MOST_ROWS if alone else min(MOST_ROWS, total / (2 * self._team.num_threads))
        if total <= enough and len(self._compiled) == 1:
            return [_Task(self._slots[slots[0]].formats, slots, offsets)]
        most = max(_LEAST_ROWS, int(enough))
        tasks: list[_Task] = []
        size = enough
        for slot, start, end in zip(slots, offsets, offsets[1:], strict=False):
            rows, formats = end - start, self._slots[slot].formats
            pieces = -(-rows // most)
            for piece in range(pieces):
                first, last = start + rows * piece // pieces, start + rows * (piece + 1) // pieces
                cost = ROWS_A_READ + last - first
                if size + cost / 2 > enough or formats != tasks[-1].formats:
                    tasks.append(_Task(formats, [], [first]))
                    size = 0
                tasks[-1].slots.append(slot)
                tasks[-1].starts.append(last)
                size += cost
        return tasks


def _widen(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return weight
    return Fp8Block().dequantise(QuantisedWeight(weight, scale), weight.shape[1])
