"""The placement table: which groups hold an expert, and where each group's replicas answer.

Immutable and versioned: a change is a new table. Routers swap one reference; whoever planned with the old table
finishes with the old table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupReplica:
    """One running copy of an expert group.

    replica: unique for every start of a process, so that a restarted group is never mistaken for the dead one
    node:    stable name of the machine it runs on (what "one copy per node" counts)
    address: host:port of its ExpertService
    actor:   name of its Ray actor, for transport `ray`; empty where there is none
    """

    group: int
    replica: str
    node: str
    address: str
    actor: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementTable:
    """Where every expert is.

    holders:  layer -> for each expert of the layer, the groups that hold a slot of it, ascending
    replicas: every live replica of every group, ascending by (group, replica)
    """

    version: int
    num_groups: int
    holders: Mapping[int, tuple[tuple[int, ...], ...]] = field(repr=False)
    replicas: tuple[GroupReplica, ...]

    def missing_groups(self) -> tuple[int, ...]:
        """Groups that hold experts and have no live replica, ascending."""
        live = {replica.group for replica in self.replicas}
        return tuple(group for group in range(self.num_groups) if group not in live)
