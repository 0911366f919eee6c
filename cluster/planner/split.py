"""Who gets the GPUs: expert groups, one a GPU, and engines, one a GPU.

Expert groups fill nodes from the first; engines take what is left at the end. On several nodes whole nodes go
to one or the other, so that a pod is a node and a node-limited gate meets whole nodes. Inside one node, or
where no such split fits, a node is shared and pods are as large as divides both parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, gcd

from cluster.planner.nodes_touched import Holders
from router_service.placement import balanced


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """One way to divide `nodes` x `gpus_per_node`.

    groups:         distinct expert groups; each holds as many experts of every layer as the others
    group_replicas: copies of each whole group, where there are more GPUs than experts in a layer
    num_redundant_experts: slots of a layer beyond one an expert, so that every group holds equally many
    """

    nodes: int
    gpus_per_node: int
    num_experts: int
    engine_gpus: int
    groups: int
    group_replicas: int

    @property
    def expert_gpus(self) -> int:
        return self.groups * self.group_replicas

    @property
    def slots_per_group(self) -> int:
        """Experts of one layer in one group."""
        return ceil(self.num_experts / self.groups)

    @property
    def num_redundant_experts(self) -> int:
        return self.slots_per_group * self.groups - self.num_experts

    @property
    def pod_gpus(self) -> int:
        """GPUs of a pod: the largest number that divides a node and both parts."""
        return gcd(self.gpus_per_node, self.engine_gpus, self.expert_gpus)

    @property
    def whole_nodes(self) -> bool:
        return self.engine_gpus % self.gpus_per_node == 0

    def groups_on_node(self) -> tuple[int, ...]:
        """Distinct groups on each node that has any, of one copy of the model."""
        full, rest = divmod(self.groups, self.gpus_per_node)
        return (self.gpus_per_node,) * full + ((rest,) if rest else ())

    def holders(self) -> Holders:
        """For each expert of a layer, the nodes that hold it, as the controller will place it."""
        return _holders(self.num_experts, self.groups, self.gpus_per_node, self.num_redundant_experts)

    def shared_node(self) -> int | None:
        """The node that has expert groups and engines, if any."""
        full, rest = divmod(self.expert_gpus, self.gpus_per_node)
        return full if rest else None


@lru_cache(maxsize=1024)
def _holders(num_experts: int, groups: int, gpus_per_node: int, num_redundant_experts: int) -> Holders:
    node_of = [group // gpus_per_node for group in range(groups)]
    placed = balanced(
        {0: num_experts},
        groups,
        nodes_of_groups=[str(node) for node in node_of],
        num_redundant_experts=num_redundant_experts,
    )
    return tuple(tuple(sorted({node_of[group] for group in held})) for held in placed[0])


def splits(nodes: int, gpus_per_node: int, num_experts: int, *, whole_nodes: bool) -> Iterator[Split]:
    """Every split with at least one engine and one group; only those of whole nodes, or only the others."""
    total = nodes * gpus_per_node
    for engine_gpus in range(1, total):
        expert_gpus = total - engine_gpus
        if (engine_gpus % gpus_per_node == 0) != whole_nodes:
            continue
        if expert_gpus > num_experts and expert_gpus % num_experts:
            continue
        groups = min(expert_gpus, num_experts)
        yield Split(
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            num_experts=num_experts,
            engine_gpus=engine_gpus,
            groups=groups,
            group_replicas=expert_gpus // groups,
        )
