"""Calls that their callers cancelled before a group met them."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from experts.wire.codec import CallCancelled

# Most of the calls that are cancelled have begun, and nobody asks for them: the oldest are forgotten.
_MOST = 4096


class CancelledCalls:
    """What a group was told of and has not met yet. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._call_ids: dict[int, None] = {}

    def add(self, call_ids: Iterable[int]) -> None:
        """Nobody wants their answers any more."""
        with self._lock:
            self._call_ids.update(dict.fromkeys(call_ids))
            for _ in range(len(self._call_ids) - _MOST):
                del self._call_ids[next(iter(self._call_ids))]

    def check(self, call_id: int) -> None:
        """Before a call begins. Raises CallCancelled where it was cancelled, once."""
        if not self._call_ids:
            return
        with self._lock:
            if call_id not in self._call_ids:
                return
            del self._call_ids[call_id]
        raise CallCancelled("the caller went away before its call began")
