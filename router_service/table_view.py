"""A placement table, indexed for planning, and the board that holds the current one."""

from __future__ import annotations

import threading

from experts.errors import RequestError
from router_service.placement import GroupReplica, PlacementTable
from router_service.slot_index import SlotIndex, build_slot_index


class TableView:
    """A table and what planning derives from it once. Never changes what it answers; safe between threads."""

    def __init__(self, table: PlacementTable) -> None:
        self.table = table
        self.replicas: tuple[tuple[GroupReplica, ...], ...] = tuple(
            tuple(replica for replica in table.replicas if replica.group == group) for group in range(table.num_groups)
        )
        self.missing = frozenset(table.missing_groups())
        self._indices: dict[tuple[int, frozenset[int]], SlotIndex] = {}

    def slots(self, layer: int, avoid: frozenset[int]) -> SlotIndex:
        """Slots of `layer`, without the groups to avoid wherever an expert has another.

        Raises RequestError where the table does not know the layer.
        """
        index = self._indices.get((layer, avoid))
        if index is None:
            holders = self.table.holders.get(layer)
            if holders is None:
                known = ", ".join(map(str, sorted(self.table.holders)))
                raise RequestError(f"layer {layer} has no experts; layers with experts: {known}", "layer")
            index = self._indices[layer, avoid] = build_slot_index(holders, self.table.num_groups, avoid)
        return index


class TableBoard:
    """Where the current table hangs. Readers take one reference; writers swap it and wake whoever waits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._view: TableView | None = None

    @property
    def view(self) -> TableView | None:
        return self._view

    def publish(self, table: PlacementTable) -> tuple[GroupReplica, ...]:
        """Make `table` current and return the replicas that it no longer lists; ignore one older than the
        current."""
        with self._changed:
            previous = self._view
            if previous is not None and table.version < previous.table.version:
                return ()
            self._view = TableView(table)
            self._changed.notify_all()
        if previous is None:
            return ()
        listed = {replica.replica for replica in table.replicas}
        return tuple(replica for replica in previous.table.replicas if replica.replica not in listed)

    def wait_other(self, seen: TableView | None, timeout_s: float) -> bool:
        """Wait until the current view is not `seen`; False where the time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: self._view is not seen, timeout_s)
