"""A small batch whose experts are at work."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from router_service.desk import Desk
from router_service.pending import Pending

if TYPE_CHECKING:
    from router_service.small_batches import SmallBatches

_CANCELLED = "cancelled by its caller"


class SmallBatch:
    """A batch whose experts are at work, see `Pending`."""

    def __init__(
        self,
        batches: SmallBatches,
        desk: Desk,
        layer: int,
        hidden_TH: torch.Tensor,
        dispatched: float,
        out_TH: npt.NDArray[np.float32] | None = None,
    ) -> None:
        """dispatched: when it began, on the monotonic clock;  out_TH: what is there of its sum, see `desk.progress`"""
        self._batches = batches
        # Whoever takes it, `result` or `cancel`, in whichever threads, is the only one.
        self._desk = [desk]
        self._is_cancelled = False
        self._again: Pending | None = None
        self._layer = layer
        self._hidden_TH = hidden_TH
        self._dispatched = dispatched
        self._out_TH = np.empty(hidden_TH.shape, np.float32) if out_TH is None else out_TH

    def result(self) -> torch.Tensor:
        """combined_TH, float32; the same sum, to the bit, and the same errors as `Pending.result`."""
        # Loads LLVM, which a GPU's process does not need.
        from experts.wire._numba.add_answers import LATE, SUMMED

        try:
            desk = self._desk.pop()
        except IndexError:
            raise TimeoutError(_CANCELLED) from None
        batches, (num_tokens, hidden_size) = self._batches, self._hidden_TH.shape
        out_TH, ended = self._out_TH, LATE
        while ended == LATE and batches.board.view is desk.view and not self._is_cancelled:
            if time.monotonic() - self._dispatched > batches.reply_timeout_s:
                # It has been waited for: who asks again need not wait for its answer another time.
                batches.lost(desk.view, int(desk.progress[0]))
                break
            ended = compiled_add_answers()(
                *(desk.lane.sockets_G, desk.call_id, desk.split.shares_G3, desk.split.tokens_R, desk.progress),
                *(int(1e3 * batches.patience_s), desk.message, desk.values, out_TH),
            )
        whole = ended == SUMMED
        if whole:
            split, seconds = desk.split, time.monotonic() - self._dispatched
            batches.counters.small_batches(
                *([self._layer], split.rows_E[None], split.shares_G3[None], num_tokens, hidden_size, [seconds])
            )
        batches.leave(desk, usable=whole)
        if whole:
            return torch.from_numpy(out_TH)
        if self._is_cancelled:
            raise TimeoutError(_CANCELLED)
        self._again = again = batches.again(self._layer, self._hidden_TH, *desk.choice(num_tokens))
        try:
            # In this order, and `cancel` in the other, one of the two sees it.
            if self._is_cancelled:
                again.cancel()
            return again.result()
        finally:
            self._again = None

    def cancel(self) -> None:
        """Nobody wants the result any more; from any thread."""
        self._is_cancelled = True
        if (again := self._again) is not None:
            again.cancel()
        with suppress(IndexError):  # it was taken, by who waits in `result` perhaps
            self._batches.leave(self._desk.pop(), usable=False)

    __del__ = cancel


@cache
def compiled_add_answers() -> Callable[..., int]:
    """What adds the groups' answers; the first call compiles it."""
    # Loads LLVM, which a GPU's process does not need.
    from experts.wire._numba.add_answers import compile_add_answers

    return compile_add_answers()
