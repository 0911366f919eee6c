"""The controller: groups start empty and join; it assigns experts, publishes tables, and notices who is lost.

Plain asyncio, no Ray: `cluster.deployments` puts it behind a Serve deployment. Its state is rebuilt from what groups
announce when they join again, so a restarted controller changes nothing for the engines.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experts.spec import ExpertKey
from router_service.placement import GroupReplica, PlacementTable, balanced

log = logging.getLogger(__name__)

WatchHealth = Callable[[str], Awaitable[str]]
Holders = Mapping[int, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """What a group replica is to hold.

    replicas_on_host: those, itself included, that listen on its address: they share a machine's cores, or a pod's
    groups_on_host:   whose replicas they are, ascending
    """

    keys: frozenset[ExpertKey]
    replicas_on_host: int
    groups_on_host: tuple[int, ...]


@dataclass(kw_only=True, slots=True)
class _Member:
    replica: GroupReplica
    device: str
    resident: frozenset[ExpertKey]
    ready: bool = False
    leaving: bool = False
    loaded_bytes: int = 0
    total_bytes: int = 0
    tokens_per_s: float = 0.0
    watcher: asyncio.Task[None] | None = field(default=None, repr=False)


class Controller:
    """One per application. All methods run on one event loop.

    watch_health: awaits until the replica at an address is lost, returns why.

    Raises ConfigError where the experts cannot be spread over so many groups.
    """

    def __init__(
        self,
        *,
        experts_per_layer: Mapping[int, int],
        num_groups: int,
        watch_health: WatchHealth,
        num_redundant_experts: int = 0,
    ) -> None:
        self._experts_per_layer = dict(experts_per_layer)
        self._num_groups = num_groups
        self._num_redundant_experts = num_redundant_experts
        self._watch_health = watch_health
        self._members: dict[str, _Member] = {}
        self._holders: Holders | None = None
        self._version = 0
        self._losses = 0
        self._table: PlacementTable | None = None
        self._changed = asyncio.Condition()
        self._balanced(nodes_of_groups=None)

    async def join(
        self, replica: GroupReplica, *, device: str, resident: frozenset[ExpertKey], known_version: int
    ) -> Assignment:
        """A group replica is up; waits until every group has joined, returns what this one is to hold.

        resident: what it holds already (a controller that restarted learns it here), else empty.
        known_version: newest table version that the group has seen, so that versions never go back.
        """
        member = _Member(replica=replica, device=device, resident=resident)
        async with self._changed:
            self._version = max(self._version, known_version)
            self._members[replica.replica] = member
            member.watcher = asyncio.create_task(self._watch(member))
            log.info("group %d joined: %s on %s", replica.group, replica.replica, replica.node)
            if self._holders is None and not self._absent_groups():
                self._holders = self._first_placement()
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._holders is not None)
        assert self._holders is not None
        keys = frozenset(
            ExpertKey(layer, expert)
            for layer, experts in self._holders.items()
            for expert, groups in enumerate(experts)
            if replica.group in groups
        )
        groups = [m.replica.group for m in self._members.values() if _host(m.replica) == _host(replica)]
        groups = groups or [replica.group]  # it may have gone meanwhile
        return Assignment(keys=keys, replicas_on_host=len(groups), groups_on_host=tuple(sorted(set(groups))))

    async def progress(self, replica: str, loaded_bytes: int, total_bytes: int) -> None:
        """How far a replica's loading is."""
        if member := self._members.get(replica):
            member.loaded_bytes, member.total_bytes = loaded_bytes, total_bytes

    async def ready(self, replica: str) -> None:
        """The replica holds everything that it was assigned: it enters the table."""
        async with self._changed:
            if member := self._members.get(replica):
                member.ready = True
                self._publish()

    async def retire(self, replica: str) -> None:
        """The replica is about to stop: new calls go to the others of its group. It stays in the table to finish."""
        async with self._changed:
            if member := self._members.get(replica):
                member.leaving = True
                log.info("group %d: %s is about to stop", member.replica.group, replica)
                self._publish()

    async def leave(self, replica: str) -> None:
        """The replica has finished what it was asked: it leaves the table before it stops answering."""
        await self._remove(replica, "it is stopping")

    async def load_share(self, replica: str, tokens_per_s: float) -> float:
        """A replica tells its rate and learns its group's rate over the mean over groups (1.0 while all are idle)."""
        member = self._members.get(replica)
        if member is None:
            return 1.0
        member.tokens_per_s = tokens_per_s
        of_group = sum(m.tokens_per_s for m in self._members.values() if m.replica.group == member.replica.group)
        mean = sum(m.tokens_per_s for m in self._members.values()) / self._num_groups
        return of_group / mean if mean > 0 else 1.0

    async def watch(self, known_version: int) -> AsyncIterator[PlacementTable]:
        """Every table newer than `known_version`, as it is published; ends only with the caller."""
        self._version = max(self._version, known_version)
        while True:
            async with self._changed:
                while self._table is None or self._table.version <= known_version:
                    await self._changed.wait()
                table = self._table
            known_version = table.version
            yield table

    def status(self) -> dict[str, Any]:
        """JSON-ready: version, groups with their replicas and loading progress, losses."""
        slots = Counter(group for experts in (self._holders or {}).values() for groups in experts for group in groups)
        members = sorted(self._members.values(), key=lambda m: (m.replica.group, m.replica.replica))
        return {
            "placement_version": self._table.version if self._table else 0,
            "groups": [
                {
                    "group": group,
                    "slots": slots[group],
                    "replicas": [
                        {
                            "replica": m.replica.replica,
                            "node": m.replica.node,
                            "device": m.device,
                            "address": m.replica.address,
                            "ready": m.ready,
                            "leaving": m.leaving,
                            "tokens_per_s": round(m.tokens_per_s, 1),
                            "loaded_bytes": m.loaded_bytes,
                            "total_bytes": m.total_bytes,
                        }
                        for m in members
                        if m.replica.group == group
                    ],
                }
                for group in range(self._num_groups)
            ],
            "missing_groups": self._missing_groups(),
            "replicas_lost": self._losses,
        }

    def _absent_groups(self) -> list[int]:
        present = {member.replica.group for member in self._members.values()}
        return [group for group in range(self._num_groups) if group not in present]

    def _missing_groups(self) -> list[int]:
        ready = {member.replica.group for member in self._members.values() if member.ready}
        return [group for group in range(self._num_groups) if group not in ready]

    def _first_placement(self) -> Holders:
        """What the groups hold already if that is everything (we restarted), else a balanced placement."""
        held: dict[ExpertKey, set[int]] = {}
        for member in self._members.values():
            for key in member.resident:
                held.setdefault(key, set()).add(member.replica.group)
        every = [[ExpertKey(layer, e) for e in range(count)] for layer, count in self._experts_per_layer.items()]
        if all(key in held for keys in every for key in keys):
            return {keys[0].layer: tuple(tuple(sorted(held[key])) for key in keys) for keys in every if keys}
        node_of = {member.replica.group: member.replica.node for member in self._members.values()}
        return self._balanced(nodes_of_groups=[node_of[group] for group in range(self._num_groups)])

    def _balanced(self, nodes_of_groups: Sequence[str] | None) -> Holders:
        return balanced(
            self._experts_per_layer,
            self._num_groups,
            nodes_of_groups=nodes_of_groups,
            num_redundant_experts=self._num_redundant_experts,
        )

    def _publish(self) -> None:
        """Make a new table. The first one waits until every group is ready: engines then serve, or go on serving."""
        if self._holders is None or (self._table is None and self._missing_groups()):
            return
        self._version += 1
        ready = (member.replica for member in self._members.values() if member.ready)
        self._table = PlacementTable(
            version=self._version,
            num_groups=self._num_groups,
            holders=self._holders,
            replicas=tuple(sorted(ready, key=lambda r: (r.group, r.replica))),
            leaving=frozenset(name for name, member in self._members.items() if member.leaving),
        )
        log.info("placement version %d: %d replicas", self._version, len(self._table.replicas))
        self._changed.notify_all()

    async def _watch(self, member: _Member) -> None:
        reason = await self._watch_health(member.replica.address)
        self._losses += 1
        await self._remove(member.replica.replica, reason)

    async def _remove(self, replica: str, reason: str) -> None:
        async with self._changed:
            member = self._members.pop(replica, None)
            if member is None:
                return
            if member.watcher is not None and member.watcher is not asyncio.current_task():
                member.watcher.cancel()
            log.warning("group %d lost replica %s: %s", member.replica.group, replica, reason)
            self._publish()


def _host(replica: GroupReplica) -> str:
    return replica.address.rpartition(":")[0]
