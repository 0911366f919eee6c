"""The router of `cluster.bench.node_bytes`, which runs on a host of its own and reads every host's interface.

    python -m cluster.bench.node_bytes_router JOB_FILE

prints a row (see `cluster.bench.node_bytes.run`) a line, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.bench.dispatch_copies import PATTERNS
from cluster.bench.hosts import Host
from experts.wire.frame import SCALE_COLUMNS
from router_service.gating.build import build_gate
from router_service.gating.gate import Gate
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.transport.grpc_stream import GrpcTransport
from router_service.transport.wire_dtype import WireDtype

MODES = ("per expert", "per node", "exact", "restrict")

# Bytes of a hidden state's value on its way out, scales included, and of a partial sum's on its way back.
_WIRE_BYTES: dict[WireDtype, tuple[float, float]] = {
    "model": (4, 4),
    "bf16": (2, 2),
    "fp8": (1 + 4 / SCALE_COLUMNS, 2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """addresses: of the groups on each of `nodes`; the others: see `NodeBytesBench`."""

    engine: Host
    nodes: Sequence[Host]
    addresses: Sequence[Sequence[str]]
    patterns: Sequence[str]
    node_counts: Sequence[int]
    wire_dtypes: Sequence[WireDtype]
    tokens: int
    batches: int


def measure(job: Job, pattern_name: str, wire_dtype: WireDtype, num_nodes: int, mode: str) -> dict[str, Any]:
    """One row."""
    pattern = PATTERNS[pattern_name]
    num_experts, hidden_size = pattern.spec.num_experts, pattern.hidden_size
    replicas = tuple(
        GroupReplica(group=group, replica=f"g{group}", node=f"node-{node}", address=address)
        for group, (node, address) in enumerate(
            (node, address) for node in range(num_nodes) for address in job.addresses[node][: pattern.groups_per_node]
        )
    )
    node_of_groups = [replica.node for replica in replicas]
    redundant = pattern.redundant if mode == "exact" else 0
    holders = balanced({0: num_experts}, len(replicas), nodes_of_groups=node_of_groups, num_redundant_experts=redundant)
    generator = torch.Generator().manual_seed(0)
    weight_EH = torch.randn(num_experts, hidden_size, generator=generator) / hidden_size**0.5
    gate = build_gate(pattern.spec, weight_EH, torch.zeros(num_experts))
    # As many nodes as there are would be no limit.
    limit = {"exact": 1, "restrict": min(pattern.max_nodes, num_nodes - 1)}.get(mode)
    router = Router(
        GrpcTransport(wire_dtype),
        {0: gate},
        recovery_timeout_s=60.0,
        node=None if mode == "per expert" else "engine",
        max_nodes_per_token=limit,
        node_limit_mode="restrict" if mode == "restrict" else "exact",
    )
    router.update(PlacementTable(version=1, num_groups=len(replicas), holders=holders, replicas=replicas))
    node_of_experts = [node_of_groups[groups[0]] for groups in holders[0]]
    run: Callable[[torch.Tensor], int] = (
        (lambda hidden_TH: _run_per_expert(router, gate, node_of_experts, hidden_TH))
        if mode == "per expert"
        else (lambda hidden_TH: _run(router, hidden_TH))
    )
    try:
        # Opens the connections.
        run(torch.randn(1 + job.tokens // 8, hidden_size, generator=generator))
        counted = [_traffic(job.nodes[:num_nodes]), _traffic([job.engine])]
        touched = sum(run(torch.randn(job.tokens, hidden_size, generator=generator)) for _ in range(job.batches))
        counted += [_traffic(job.nodes[:num_nodes]), _traffic([job.engine])]
    finally:
        router.close()
    tokens = job.tokens * job.batches
    (out, back), (engine_back, engine_out) = (
        [(after - before) / tokens for before, after in zip(counted[end], counted[end + 2], strict=True)]
        for end in (0, 1)
    )
    wire_out, wire_back = (touched / tokens * hidden_size * width for width in _WIRE_BYTES[wire_dtype])
    return {
        "pattern": pattern_name,
        "wire_dtype": wire_dtype,
        "nodes": num_nodes,
        "mode": mode,
        "redundant_experts": redundant,
        "limit": limit,
        "nodes_touched": round(touched / tokens, 3),
        "bytes_out": round(out),
        "bytes_back": round(back),
        "ratio_out": round(out / wire_out, 3),
        "ratio_back": round(back / wire_back, 3),
        "engine_bytes_out": round(engine_out),
        "engine_bytes_back": round(engine_back),
    }


def _run(router: Router, hidden_TH: torch.Tensor) -> int:
    """Nodes touched, summed over tokens, as the router counts them."""
    before = router.counters.token_nodes
    router.route(0, hidden_TH).result()
    return router.counters.token_nodes - before


def _run_per_expert(router: Router, gate: Gate, node_of_experts: Sequence[str], hidden_TH: torch.Tensor) -> int:
    """As where every (token, expert) pair is a row of its own, there and back; the caller adds the rows."""
    expert_ids_TK, weights_TK = gate(hidden_TH)
    num_tokens, top_k = expert_ids_TK.shape
    rows_RH = hidden_TH.repeat_interleave(top_k, dim=0)
    partial_RH = router.dispatch(0, rows_RH, expert_ids_TK.reshape(-1, 1), weights_TK.reshape(-1, 1)).result()
    partial_RH.view(num_tokens, top_k, -1).sum(dim=1)
    return sum(len({node_of_experts[expert] for expert in ids}) for ids in expert_ids_TK.tolist())


def _traffic(hosts: Sequence[Host]) -> tuple[int, int]:
    received, sent = zip(*(host.traffic() for host in hosts), strict=True)
    return sum(received), sum(sent)


@torch.inference_mode()
def main(job_file: Path) -> None:
    """Run a job."""
    torch.set_num_threads(1)
    document = json.loads(job_file.read_text())
    engine, nodes = Host(**document.pop("engine")), [Host(**node) for node in document.pop("nodes")]
    job = Job(engine=engine, nodes=nodes, **document)
    for pattern in job.patterns:
        for wire_dtype in job.wire_dtypes:
            for num_nodes in job.node_counts:
                for mode in MODES:
                    print(json.dumps(measure(job, pattern, wire_dtype, num_nodes, mode)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
