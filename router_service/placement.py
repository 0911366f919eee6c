"""The placement table: which groups hold an expert, and where each group's replicas answer.

Immutable and versioned: a change is a new table. Routers swap one reference; whoever planned with the old
table finishes with the old table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from experts.errors import ConfigError


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
    leaving:  names of those that are about to stop: they finish what they were asked, and get more only where their
              group has no other
    """

    version: int
    num_groups: int
    holders: Mapping[int, tuple[tuple[int, ...], ...]] = field(repr=False)
    replicas: tuple[GroupReplica, ...]
    leaving: frozenset[str] = frozenset()

    def missing_groups(self) -> tuple[int, ...]:
        """Groups that hold experts and have no live replica, ascending."""
        live = {replica.group for replica in self.replicas}
        return tuple(group for group in range(self.num_groups) if group not in live)

    def callable_replicas(self, group: int) -> tuple[GroupReplica, ...]:
        """The replicas of `group` to choose from for a new call."""
        replicas = tuple(replica for replica in self.replicas if replica.group == group)
        return tuple(replica for replica in replicas if replica.replica not in self.leaving) or replicas


def balanced(
    experts_per_layer: Mapping[int, int],
    num_groups: int,
    *,
    nodes_of_groups: Sequence[str] | None = None,
    num_redundant_experts: int = 0,
) -> dict[int, tuple[tuple[int, ...], ...]]:
    """Holders (see `PlacementTable.holders`) with equal counts, before any load is known.

    Experts go to groups as contiguous ranges, groups taken node by node, so that a model's native gate groups
    (contiguous ranges themselves) fall on one node each wherever the counts divide. Redundant experts are
    second slots on another node where there is one, spread evenly over the experts and over the groups.

    experts_per_layer:     layer -> number of routed experts
    nodes_of_groups:       node name of each group; None: all on one node
    num_redundant_experts: slots beyond one per expert, in each layer
    Raises ConfigError where a layer has fewer experts than there are groups, or more redundant slots are
    asked for than groups can hold without holding an expert twice.
    """
    nodes = list(nodes_of_groups) if nodes_of_groups is not None else [""] * num_groups
    if len(nodes) != num_groups:
        raise ConfigError(f"{len(nodes)} nodes were named for {num_groups} expert groups; name one per group")
    holders: dict[int, tuple[tuple[int, ...], ...]] = {}
    spread: dict[int, tuple[tuple[int, ...], ...]] = {}
    for layer, num_experts in experts_per_layer.items():
        if num_groups > num_experts:
            raise ConfigError(
                f"experts.groups is {num_groups}, but layer {layer} has {num_experts} experts and a group "
                "would stay "
                f"empty; set experts.groups to at most {num_experts}"
            )
        if num_redundant_experts > num_experts * (num_groups - 1):
            raise ConfigError(
                f"experts.num_redundant_experts is {num_redundant_experts}, but {num_groups} groups have "
                "room for at "
                f"most {num_experts * (num_groups - 1)} further slots of layer {layer}'s {num_experts} "
                "experts"
            )
        if num_experts not in spread:
            spread[num_experts] = _spread(num_experts, nodes, num_redundant_experts)
        holders[layer] = spread[num_experts]
    return holders


def _spread(num_experts: int, nodes: Sequence[str], num_redundant_experts: int) -> tuple[tuple[int, ...], ...]:
    num_groups = len(nodes)
    by_node = sorted(range(num_groups), key=lambda group: (nodes[group], group))
    home = [by_node[expert * num_groups // num_experts] for expert in range(num_experts)]
    held = [{group} for group in home]
    slots = [home.count(group) for group in range(num_groups)]
    copied_from = [0] * num_groups
    for _ in range(num_redundant_experts):
        target = min(range(num_groups), key=lambda group: (slots[group], group))
        expert = min(
            (expert for expert in range(num_experts) if target not in held[expert]),
            key=lambda expert: (
                len(held[expert]),
                nodes[home[expert]] == nodes[target],
                copied_from[home[expert]],
                expert,
            ),
        )
        held[expert].add(target)
        slots[target] += 1
        copied_from[home[expert]] += 1
    return tuple(tuple(sorted(groups)) for groups in held)
