"""Who waits for a batch."""

from __future__ import annotations

import math
import time

from router_service.flight import NodeFlight


class Caller:
    """Until when they wait, whether they still do, and what is out for them.

    One thread sends and waits; `cancel` may come from any other.
    """

    def __init__(self, timeout_s: float | None = None) -> None:
        """timeout_s: their time limit, from now on; None: none"""
        self.until = math.inf if timeout_s is None else time.monotonic() + timeout_s
        self._is_gone = False
        self._out: list[NodeFlight] = []

    def left_s(self) -> float | None:
        """What is left of the time limit; None where there is none."""
        return None if self.until == math.inf else max(0.0, self.until - time.monotonic())

    def why_gone(self) -> str | None:
        """Why nobody waits any more; None where somebody does. What fails from then on says nothing of a replica."""
        if self._is_gone:
            return "cancelled by its caller"
        return "the caller's time limit passed" if time.monotonic() >= self.until else None

    def sent(self, flight: NodeFlight) -> NodeFlight:
        """`flight`, which is out for them from now on."""
        # In this order, and `cancel` in the other, one of the two sees it.
        self._out.append(flight)
        if self._is_gone:
            flight.cancel()
        return flight

    def cancel(self) -> None:
        """Nobody waits any more: tell the groups, where the transport can."""
        self._is_gone = True
        for flight in tuple(self._out):
            flight.cancel()
