"""Two pieces of work that take turns: one runs, until it would wait for somebody else; then the other does.

Threads as coroutines: work that calls through code which is not ours (a whole model's forward) can be left in the
middle only with a stack of its own. Never do both run, so what they share needs no lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class OtherFailed(Exception):
    """The other piece of work failed; there is no use in going on."""


class Turns:
    """Use once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._turn = 0
        self._one_ended = False
        self._errors: list[BaseException] = []

    def run(self, first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
        """What both return. `first` begins, in the caller's thread; `second` has a thread of its own.

        Raises what the first of them to fail raised, when the other has ended too: `hand_over` raises there.
        """
        results: dict[int, T] = {}

        def play(turn: int, work: Callable[[], T]) -> None:
            try:
                self._wait_for(turn)
                results[turn] = work()
            except BaseException as error:
                self._errors.append(error)
            finally:
                self._end(turn)

        # A daemon: where it waits for ever, the process must still be able to end.
        thread = threading.Thread(target=play, args=(1, second), name="other-micro-batch", daemon=True)
        thread.start()
        play(0, first)
        thread.join()
        if self._errors:
            raise self._errors[0]
        return results[0], results[1]

    def hand_over(self) -> None:
        """Let the other work until it hands over or ends. Raises OtherFailed where it failed."""
        with self._changed:
            turn = self._turn
            if not self._one_ended:
                self._turn = 1 - turn
                self._changed.notify()
        self._wait_for(turn)

    def _wait_for(self, turn: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == turn)
            if self._errors:
                raise OtherFailed

    def _end(self, turn: int) -> None:
        with self._changed:
            self._one_ended = True
            self._turn = 1 - turn
            self._changed.notify()
