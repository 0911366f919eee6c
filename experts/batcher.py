"""Calls that arrive while the shard is busy run together."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch

from experts.errors import RequestError
from experts.shard import ExpertShard
from experts.spec import ExpertCall


class _Waiting:
    """A caller's call and, once `done` is set, its answer; neither answer nor error: the caller leads now."""

    def __init__(self, call: ExpertCall) -> None:
        self.call = call
        self.done = threading.Event()
        self.partial_TH: torch.Tensor | None = None
        self.error: BaseException | None = None


class Batcher:
    """Coalesces concurrent callers of one layer, without a timer and without a thread of its own.

    Who finds the shard idle leads. Who comes meanwhile waits; when the leader is done, the oldest of those
    leads next and runs everything that is queued for its layer as one call. A lone caller keeps its thread.
    """

    def __init__(self, shard: ExpertShard) -> None:
        self._shard = shard
        self._lock = threading.Lock()
        self._busy = False
        self._queues: OrderedDict[tuple[object, ...], list[_Waiting]] = OrderedDict()

    def run(self, call: ExpertCall) -> torch.Tensor:
        """`partial_TH` of the call, or what `ExpertShard.forward` raises for it."""
        with self._lock:
            lead, self._busy = not self._busy, True
            if not lead:
                waiting = _Waiting(call)
                self._queues.setdefault(_kind(call), []).append(waiting)
        if lead:
            try:
                return self._shard.forward(call)
            finally:
                self._hand_over()
        waiting.done.wait()
        if waiting.error is not None:
            raise waiting.error
        if waiting.partial_TH is not None:
            return waiting.partial_TH
        try:
            with self._lock:
                followers = self._queues.pop(_kind(call))
            _run_together(self._shard, followers)
        finally:
            self._hand_over()
        if waiting.error is not None:
            raise waiting.error
        assert waiting.partial_TH is not None
        return waiting.partial_TH

    def _hand_over(self) -> None:
        """Wake the caller that has waited longest as the next leader, or leave the shard idle."""
        with self._lock:
            if self._queues:
                next(iter(self._queues.values()))[0].done.set()
            else:
                self._busy = False


def _kind(call: ExpertCall) -> tuple[object, ...]:
    """Calls that are alike in this can run as one."""
    return call.layer, call.hidden_TH.dtype, call.hidden_TH.device, call.hidden_TH.shape[1]


def _run_together(shard: ExpertShard, waiting: Sequence[_Waiting]) -> None:
    """Answer all of `waiting`. The first is the leader itself, whose `done` is set already."""
    try:
        partial_TH = shard.forward(merge_calls([each.call for each in waiting]))
        first = 0
        for each in waiting:
            last = first + len(each.call.hidden_TH)
            each.partial_TH = partial_TH[first:last]
            first = last
    except RequestError:
        # One of them is wrong: only that one may fail.
        for each in waiting:
            _run_alone(shard, each)
    except BaseException as error:
        for each in waiting:
            each.error = error
    finally:
        for each in waiting:
            each.done.set()


def _run_alone(shard: ExpertShard, waiting: _Waiting) -> None:
    try:
        waiting.partial_TH = shard.forward(waiting.call)
    except Exception as error:
        waiting.error = error


def merge_calls(calls: Sequence[ExpertCall]) -> ExpertCall:
    """One call with the tokens of all, in order; rows of an expert stay in their calls' order."""
    if len(calls) == 1:
        return calls[0]
    first_rows = torch.tensor([0, *(len(call.hidden_TH) for call in calls[:-1])]).cumsum(0).tolist()
    ids_R = torch.cat([call.expert_ids_S.repeat_interleave(call.offsets_S1.diff()) for call in calls])
    ids_R, order_R = torch.sort(ids_R, stable=True)
    expert_ids_S, counts_S = torch.unique_consecutive(ids_R, return_counts=True)
    offsets_S1 = torch.zeros(len(counts_S) + 1, dtype=torch.int32)
    offsets_S1[1:] = counts_S.cumsum(0)
    token_rows_R = torch.cat([call.token_rows_R + first for call, first in zip(calls, first_rows, strict=True)])
    return ExpertCall(
        layer=calls[0].layer,
        hidden_TH=torch.cat([call.hidden_TH for call in calls]),
        expert_ids_S=expert_ids_S,
        offsets_S1=offsets_S1,
        token_rows_R=token_rows_R[order_R],
        weights_R=torch.cat([call.weights_R for call in calls])[order_R],
    )
