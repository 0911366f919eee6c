"""Which replica of a group takes a call: the live one with the fewest rows in flight, of several the one whose last
turn is longest ago. An engine that waits for each layer has nothing in flight when it chooses, so turns do the work
there, and a replica that is new comes first."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence

from router_service.placement import GroupReplica
from router_service.table_view import TableView

log = logging.getLogger(__name__)
# A replica that failed is tried again after so long if nothing replaced it: a broken path may be whole again.
RETRY_S = 1.0


class ReplicaChoice:
    """Load and health of replicas as this router sees them. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._rows_in_flight: dict[str, int] = {}
        self._turns = itertools.count(1)
        self._last_turn: dict[str, int] = {}
        self._lost_at: dict[str, float] = {}

    @property
    def rows_in_flight(self) -> int:
        """Rows that were sent and neither answered nor given up."""
        with self._lock:
            return sum(self._rows_in_flight.values())

    def choose(self, view: TableView, group: int) -> GroupReplica | None:
        """The replica to send to, None where the group has none alive."""
        replicas = view.replicas[group]
        with self._lock:
            if len(replicas) == 1 and not self._lost_at:
                return replicas[0]
            self._try_again()
            live = [replica for replica in replicas if replica.replica not in self._lost_at]
            chosen = min(live, key=self._load, default=None)
            if chosen is not None:
                self._last_turn[chosen.replica] = next(self._turns)
            return chosen

    def least_loaded(self, replicas: Sequence[GroupReplica]) -> GroupReplica:
        """The one with the fewest rows in flight, the first of several."""
        with self._lock:
            return min(replicas, key=lambda replica: self._rows_in_flight.get(replica.replica, 0))

    def unreachable(self, view: TableView) -> frozenset[int]:
        """Groups of the table without a live replica."""
        if not self._lost_at:
            return view.missing
        with self._lock:
            self._try_again()
            return frozenset(
                group
                for group, replicas in enumerate(view.replicas)
                if all(replica.replica in self._lost_at for replica in replicas)
            )

    def sent(self, replica: GroupReplica, rows: int) -> Callable[[], None]:
        """Count rows that a replica owes; call what this returns once they are answered or given up (again: no-op)."""
        with self._lock:
            self._rows_in_flight[replica.replica] = self._rows_in_flight.get(replica.replica, 0) + rows
        owed = [rows]

        def settle() -> None:
            with self._lock:
                if not owed:
                    return
                left = self._rows_in_flight[replica.replica] - owed.pop()
                if left:
                    self._rows_in_flight[replica.replica] = left
                else:
                    del self._rows_in_flight[replica.replica]

        return settle

    def lost(self, replica: GroupReplica, why: str) -> None:
        """The replica failed a call: leave it out until RETRY_S has passed."""
        with self._lock:
            self._try_again()
            is_news = replica.replica not in self._lost_at
            self._lost_at[replica.replica] = self._clock()
        if is_news:
            log.warning("expert group %d counts as lost for %g s: %s", replica.group, RETRY_S, why)

    def forget(self, replicas: tuple[GroupReplica, ...]) -> None:
        """Forget the failures and turns of replicas that left the table."""
        with self._lock:
            for replica in replicas:
                self._lost_at.pop(replica.replica, None)
                self._last_turn.pop(replica.replica, None)

    def _load(self, replica: GroupReplica) -> tuple[int, int]:
        return self._rows_in_flight.get(replica.replica, 0), self._last_turn.get(replica.replica, 0)

    def _try_again(self) -> None:
        """Forget failures that are RETRY_S old; those of replicas that left the table, which come last, among them."""
        if self._lost_at:
            now = self._clock()
            self._lost_at = {replica: at for replica, at in self._lost_at.items() if now - at < RETRY_S}
