"""A placement table, indexed for planning, and the board that holds the current one."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from experts.errors import RequestError
from router_service.node_cover import NodeCover
from router_service.placement import GroupReplica, PlacementTable
from router_service.slot_index import SlotIndex, build_slot_index


class TableView:
    """A table and what planning derives from it once. Never changes what it answers; safe between threads.

    nodes: of each group; of one without a replica where it was in `before`, the view of the table before, or ""
    """

    def __init__(self, table: PlacementTable, before: TableView | None = None) -> None:
        self.table = table
        self.replicas: tuple[tuple[GroupReplica, ...], ...] = tuple(
            table.callable_replicas(group) for group in range(table.num_groups)
        )
        self.missing = frozenset(table.missing_groups())
        self._indices: dict[tuple[int, frozenset[int]], SlotIndex] = {}
        self._covers: dict[tuple[int, frozenset[int], str | None], NodeCover] = {}
        self._held: dict[int, npt.NDArray[np.bool_]] = {}
        # Several replicas of a group: the first speaks for its node.
        known = dict(enumerate(before.nodes)) if before is not None else {}
        self.nodes: tuple[str, ...] = tuple(
            replicas[0].node if replicas else known.get(group, "") for group, replicas in enumerate(self.replicas)
        )
        self._nodes = sorted(set(self.nodes))
        self._node_of_group_G = np.array([self._nodes.index(node) for node in self.nodes], dtype=np.int32)

    def slots(self, layer: int, avoid: frozenset[int]) -> SlotIndex:
        """Slots of `layer`, without the groups to avoid wherever an expert has another.

        Raises RequestError where the table does not know the layer.
        """
        index = self._indices.get((layer, avoid))
        if index is None:
            holders = self.table.holders.get(layer)
            if holders is None:
                known = ", ".join(map(str, sorted(self.table.holders)))
                raise RequestError(f"layer: {layer} has no experts; layers with experts: {known}", "layer")
            index = self._indices[layer, avoid] = build_slot_index(holders, self.table.num_groups, avoid)
        return index

    def cover(self, layer: int, avoid: frozenset[int], node: str | None) -> NodeCover | None:
        """Chooses among the slots of `slots(layer, avoid)` for a router on `node`; None where there is no choice."""
        index = self.slots(layer, avoid)
        if not index.redundant or len(self._nodes) < 2:
            return None
        cover = self._covers.get((layer, avoid, node))
        if cover is None:
            local = self._nodes.index(node) if node in self._nodes else None
            cover = self._covers[layer, avoid, node] = NodeCover(index, self._node_of_group_G, local)
        return cover

    def held_by_nodes(self, layer: int) -> npt.NDArray[np.bool_]:
        """[E, N]: does a group on the node hold the expert?"""
        held_EN = self._held.get(layer)
        if held_EN is None:
            index = self.slots(layer, frozenset())
            held_EN = np.zeros((index.num_experts, len(self._nodes)), dtype=bool)
            held_EN[index.expert_of_slot_S, self._node_of_group_G[index.group_of_slot_S]] = True
            self._held[layer] = held_EN
        return held_EN


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
            self._view = TableView(table, previous)
            self._changed.notify_all()
        if previous is None:
            return ()
        listed = {replica.replica for replica in table.replicas}
        return tuple(replica for replica in previous.table.replicas if replica.replica not in listed)

    def wait_other(self, seen: TableView | None, timeout_s: float) -> bool:
        """Wait until the current view is not `seen`; False where the time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: self._view is not seen, timeout_s)
