"""How many copies of a token's hidden state cross to other nodes, for each way of dispatching. Counted, not timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cluster.bench.dispatch_peer import IdleGroup
from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import NodeLimitMode, Router
from router_service.transport.in_process import InProcessTransport

_TOKENS, _HIDDEN_SIZE = 2048, 64
_NODES = (2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """How a published model routes.

    hidden_size: the model's; counting copies takes a narrower one
    redundant:   slots of "exact" beyond one per expert; max_nodes: of "restrict"
    """

    spec: GateSpec
    hidden_size: int
    groups_per_node: int
    redundant: int
    max_nodes: int


PATTERNS = {
    "deepseek-v3": Pattern(
        spec=GateSpec(
            system="deepseek_v3",
            num_experts=256,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            n_group=8,
            topk_group=4,
        ),
        hidden_size=7168,
        groups_per_node=2,
        redundant=32,
        max_nodes=2,
    ),
    "mixtral": Pattern(
        spec=GateSpec(system="mixtral", num_experts=8, num_experts_per_tok=2),
        hidden_size=4096,
        groups_per_node=1,
        redundant=8,
        max_nodes=1,
    ),
}


def copies_rows() -> list[dict[str, Any]]:
    """A row for each pattern and number of nodes, none of them the router's; copies per token and layer, each way.

    A random gate spreads tokens evenly, which is the most that they can be spread: a trained one touches fewer nodes.
    """
    return [_row(name, pattern, nodes) for name, pattern in PATTERNS.items() for nodes in _NODES]


def _row(name: str, pattern: Pattern, num_nodes: int) -> dict[str, Any]:
    return {
        "what": "copies_per_token",
        "pattern": name,
        "nodes": num_nodes,
        "per_expert": float(pattern.spec.num_experts_per_tok),
        "per_group": _copies(pattern, num_nodes, node=None),
        "per_node": _copies(pattern, num_nodes),
        "exact_with_redundant_experts": _copies(pattern, num_nodes, redundant=pattern.redundant, max_nodes=1),
        "restrict": _copies(pattern, num_nodes, max_nodes=pattern.max_nodes, mode="restrict"),
    }


def _copies(
    pattern: Pattern,
    num_nodes: int,
    *,
    node: str | None = "elsewhere",
    redundant: int = 0,
    max_nodes: int | None = None,
    mode: NodeLimitMode = "exact",
) -> float:
    num_groups = num_nodes * pattern.groups_per_node
    nodes = [f"node-{group // pattern.groups_per_node}" for group in range(num_groups)]
    replicas = tuple(
        GroupReplica(group=group, replica=f"g{group}", node=nodes[group], address="") for group in range(num_groups)
    )
    num_experts = pattern.spec.num_experts
    holders = balanced({0: num_experts}, num_groups, nodes_of_groups=nodes, num_redundant_experts=redundant)
    generator = torch.Generator().manual_seed(0)
    weight_EH = torch.randn(num_experts, _HIDDEN_SIZE, generator=generator) / _HIDDEN_SIZE**0.5
    router = Router(
        InProcessTransport({replica.replica: IdleGroup() for replica in replicas}),
        {0: build_gate(pattern.spec, weight_EH, torch.zeros(num_experts))},
        recovery_timeout_s=30.0,
        node=node,
        max_nodes_per_token=max_nodes,
        node_limit_mode=mode,
    )
    router.update(PlacementTable(version=1, num_groups=num_groups, holders=holders, replicas=replicas))
    router.route(0, torch.randn(_TOKENS, _HIDDEN_SIZE, generator=generator)).result()
    return round(router.counters.token_copies / _TOKENS, 3)
