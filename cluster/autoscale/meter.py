"""What a replica of an expert group reports about itself, for the policies."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable


class GroupMeter:
    """Counts a replica's calls and sums them up over the last `window_s` seconds.

    A Serve deployment returns `stats()` from its `record_autoscaling_stats`. Any thread may call any method;
    `clock` gives seconds that never run backwards.
    """

    def __init__(self, clock: Callable[[], float], *, window_s: float = 10.0) -> None:
        assert window_s > 0
        self._clock = clock
        self._window_s = window_s
        self._started = clock()
        self._lock = threading.Lock()
        self._open = 0
        self._answered: deque[tuple[float, int, float]] = deque()  # (when answered, rows, seconds it took)
        self._load_share = 1.0

    def accept(self) -> float:
        """A call has arrived; what this returns goes to `answer`."""
        with self._lock:
            self._open += 1
        return self._clock()

    def answer(self, accepted: float, rows: int) -> None:
        """The call accepted at `accepted` has its answer, or has failed (then `rows` is 0)."""
        now = self._clock()
        with self._lock:
            self._open -= 1
            self._answered.append((now, rows, now - accepted))
            self._forget(now)

    def withdraw(self) -> None:
        """What was accepted last comes again, in another form."""
        with self._lock:
            self._open -= 1

    def idle_s(self) -> float:
        """Seconds since the last answer, or since the beginning; 0 while a call is open."""
        with self._lock:
            last = self._answered[-1][0] if self._answered else self._started
            return 0.0 if self._open else self._clock() - last

    def set_load_share(self, load_share: float) -> None:
        """This group's tokens over the mean over groups, as the controller counts them; 1.0 is even."""
        with self._lock:
            self._load_share = load_share

    def stats(self) -> dict[str, float]:
        """What the policies read.

        tokens_per_s:    rows answered per second
        p95_dispatch_ms: 95th percentile (nearest rank) of arrival to answer; 0 without calls
        queue_depth:     calls accepted and not yet answered
        load_share:      see set_load_share
        """
        now = self._clock()
        with self._lock:
            self._forget(now)
            rows = sum(rows for _, rows, _ in self._answered)
            seconds = sorted(took for _, _, took in self._answered)
            open_calls, load_share = self._open, self._load_share
        span_s = min(self._window_s, now - self._started)
        p95_s = seconds[math.ceil(0.95 * len(seconds)) - 1] if seconds else 0.0
        return {
            "tokens_per_s": rows / span_s if span_s > 0 else 0.0,
            "p95_dispatch_ms": p95_s * 1000,
            "queue_depth": float(open_calls),
            "load_share": load_share,
        }

    def _forget(self, now: float) -> None:
        while self._answered and self._answered[0][0] <= now - self._window_s:
            self._answered.popleft()
