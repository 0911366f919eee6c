"""Calls of a few rows, answered by compiled code from message to message (`experts.wire._numba.answer_call`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from experts.ops.cpu_backend import MOST_ROWS, CpuBackend, Formats, Slot
from experts.spec import ExpertKey

# What surrounds the numbers of an answer is shorter.
_FRAME_BYTES = 64


class SmallAnswer(NamedTuple):
    """A serialised ForwardReply, and the routed rows that were computed for it."""

    reply: bytes
    num_rows: int


class SmallCalls:
    """Knows where the experts of a CpuBackend lie. One thread at a time."""

    def __init__(self, backend: CpuBackend) -> None:
        self._backend = backend
        self._addresses_LE6: npt.NDArray[np.int64] = np.zeros((0, 0, 6), np.int64)
        self._formats: Formats | None = None
        self._expert_bytes = 0

    def hold(self, key: ExpertKey, slot: int) -> None:
        """An expert is in `slot`. Those whose matrices are not of the first one's formats are left to other code."""
        held = self._backend.slot(slot)
        if self._formats is None:
            self._prepare(held)
        if held.formats == self._formats:
            layers, experts, _ = self._addresses_LE6.shape
            more = max(0, key.layer + 1 - layers), max(0, key.expert + 1 - experts)
            if any(more):
                self._addresses_LE6 = np.pad(self._addresses_LE6, ((0, more[0]), (0, more[1]), (0, 0)))
            self._addresses_LE6[key.layer, key.expert] = held.addresses
            self._expert_bytes = self._backend.nbytes(slot)

    def forget(self, key: ExpertKey) -> None:
        """An expert's slot is about to be freed."""
        layers, experts, _ = self._addresses_LE6.shape
        if key.layer < layers and key.expert < experts:
            self._addresses_LE6[key.layer, key.expert] = 0

    def answer(self, request: bytes) -> SmallAnswer | None:
        """The answer to a ForwardRequest; None for one that is not small, not in float32, or not in order."""
        if self._formats is None or len(request) > self._most_bytes:
            return None
        size = self._run(
            *(np.frombuffer(request, np.uint8), self._addresses_LE6, self._panels, *self._limits),
            *(self._backend.most_work_alone(self._expert_bytes), *self._work),
        )
        return SmallAnswer(self._reply[:size].tobytes(), int(self._num_rows[0])) if size else None

    def _prepare(self, held: Slot) -> None:
        # Loads LLVM, which a process without experts on CPU does not need.
        from experts.wire._numba.answer_call import compile_answer_call

        spec = self._backend.spec
        self._run: Callable[..., int] = compile_answer_call(
            spec.activation, gated=spec.gated, biased=spec.bias, up_format=held.formats[0], down_format=held.formats[1]
        )
        self._panels = np.array([len(held.up.panels), len(held.down.panels)])
        self._limits = float("inf") if spec.limit is None else spec.limit, spec.up_shift
        hidden_bytes = MOST_ROWS * spec.hidden_size * 4
        self._most_bytes = hidden_bytes + MOST_ROWS * 16 + _FRAME_BYTES
        self._reply = np.empty(hidden_bytes + _FRAME_BYTES, np.uint8)
        self._num_rows = np.zeros(1, np.int64)
        columns = spec.hidden_size, spec.hidden_size, held.up.num_columns, spec.intermediate_size
        self._work: tuple[Any, ...] = (
            *(np.empty(size, np.int32) for size in (MOST_ROWS, MOST_ROWS + 1, MOST_ROWS)),
            np.empty(MOST_ROWS, np.float32),
            *(np.empty((MOST_ROWS, size), np.float32) for size in (*columns, held.down.num_columns, spec.hidden_size)),
            *(self._reply, self._num_rows),
        )
        self._formats = held.formats  # all is there
