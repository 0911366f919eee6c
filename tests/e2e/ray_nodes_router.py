"""A router over Ray actors of other nodes, run on the head's host by `test_ray_nodes.py`: prints what it measured.

    python tests/e2e/ray_nodes_router.py HEAD_ADDRESS HEAD_NAMESPACE

Each line is JSON: hidden size and tokens of a batch, whether the sums are those of `in_process` to the bit, the
router's own count of nodes touched and of bytes, and bytes on the head's interface, all of Ray's own included: the
least of several counts.
"""

import itertools
import json
import os
import sys

import ray
import torch

from cluster.bench.hosts import Host
from experts.cancelled_calls import CancelledCalls
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.transport.in_process import InProcessTransport
from router_service.transport.ray_group import serve_calls
from router_service.transport.ray_refs import RayRefsTransport

NUM_EXPERTS, TOP_K, GROUPS_PER_NODE, BATCHES, COUNTS = 32, 8, 4, 4, 5
# Mixtral's and DeepSeek-V3's.
HIDDEN_SIZES = 4096, 7168


class Scaler:
    """A group in which expert e is worth weight * (e + 1) * hidden."""

    def forward(self, call):
        partial_TH = torch.zeros(call.hidden_TH.shape)
        scale_R = call.weights_R * (1 + call.expert_ids_S.repeat_interleave(call.offsets_S1.diff()))
        return partial_TH.index_add_(0, call.token_rows_R, scale_R[:, None] * call.hidden_TH[call.token_rows_R])


class Peer:
    """An async actor, as Serve's replicas are."""

    def __init__(self):
        serve_calls(Scaler(), CancelledCalls(), "mesh")

    async def pid(self):
        return os.getpid()


def start_groups():
    """(handles, replicas), groups ascending by node."""
    actors, replicas = [], []
    for group in range(2 * GROUPS_PER_NODE):
        name, node = f"g{group}", f"n{group // GROUPS_PER_NODE}"
        options = {"name": name, "num_cpus": 0, "label_selector": {"place": node}}
        actors.append(ray.remote(Peer).options(**options).remote())
        replicas.append(GroupReplica(group=group, replica=name, node=node, address="", actor=name))
    ray.get([actor.pid.remote() for actor in actors])
    return actors, tuple(replicas)


def batch(num_tokens, hidden_size, seed):
    """(hidden_TH, expert_ids_TK, weights_TK) at random."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TH = torch.randn(num_tokens, hidden_size, generator=generator)
    expert_ids_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(TOP_K).indices
    return hidden_TH, expert_ids_TK, torch.rand(num_tokens, TOP_K, generator=generator)


def router_over(transport, table, node):
    router = Router(transport, {}, recovery_timeout_s=60.0, node=node)
    router.update(table)
    return router


def main(address, namespace):
    ray.init(address=f"{address}:6379", namespace="mesh", logging_level="ERROR")
    actors, replicas = start_groups()
    holders = balanced({0: NUM_EXPERTS}, len(replicas), nodes_of_groups=[replica.node for replica in replicas])
    table = PlacementTable(version=1, num_groups=len(replicas), holders=holders, replicas=replicas)
    local = router_over(InProcessTransport({replica.replica: Scaler() for replica in replicas}), table, None)
    router = router_over(RayRefsTransport("mesh"), table, "engine")
    host, counters = Host(namespace, address), router.counters
    router.dispatch(0, *batch(16, HIDDEN_SIZES[0], seed=99)).result()  # finds the actors
    for hidden_size, num_tokens in itertools.product(HIDDEN_SIZES, (1, 2, 8, 64, 256, 1024)):
        batches = [batch(num_tokens, hidden_size, seed) for seed in range(BATCHES)]
        expected = [local.dispatch(0, *each).result() for each in batches]

        def count(batches=batches, expected=expected):
            before, touched, counted = host.traffic(), counters.token_nodes, counters.bytes_sent_remote
            sums = [router.dispatch(0, *each).result() for each in batches]
            received, sent = (now - then for now, then in zip(host.traffic(), before, strict=True))
            return {
                "exact": all(map(torch.equal, sums, expected)),
                "touched": counters.token_nodes - touched,
                "counted_sent": counters.bytes_sent_remote - counted,
                "node_calls": 2 * BATCHES,
                "sent": sent,
                "received": received,
            }

        counts = [count() for _ in range(COUNTS)]
        # What Ray's processes tell each other meanwhile only adds, the more the busier the machine.
        least = min(counts, key=lambda row: row["sent"] + row["received"])
        exact = all(row["exact"] for row in counts)
        print(json.dumps(least | {"hidden": hidden_size, "tokens": num_tokens, "exact": exact}), flush=True)
    router.close()
    assert actors, "an actor lives as long as its handle"


if __name__ == "__main__":
    main(*sys.argv[1:])
