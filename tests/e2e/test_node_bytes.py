"""Bytes on the wire, counted on the network interface of the router's host: one copy per node, one sum back."""

import json
import sys
import time

# Runs on the first host. DeepSeek-V3's pattern: 256 experts, top-8, 4 of 8 gate groups; 4 expert groups on 2 nodes.
ROUTER = """
import json, sys
from pathlib import Path
import torch
from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.transport.grpc_stream import GrpcTransport

HIDDEN, TOKENS, BATCHES = 2048, 256, 4
nodes, node, wire_dtype = sys.argv[1].split(","), sys.argv[2], sys.argv[3]
addresses = [Path(name).read_text().split()[0] for name in sys.argv[4:]]
torch.set_num_threads(1)
torch.manual_seed(0)
replicas = tuple(
    GroupReplica(group=group, replica=f"g{group}", node=nodes[group], address=address)
    for group, address in enumerate(addresses)
)
holders = balanced({0: 256}, 4, nodes_of_groups=nodes)
spec = GateSpec(
    system="deepseek_v3", num_experts=256, num_experts_per_tok=8, norm_topk_prob=True, n_group=8, topk_group=4
)
gate = build_gate(spec, torch.randn(256, HIDDEN) / HIDDEN**0.5, torch.zeros(256))
router = Router(GrpcTransport(wire_dtype), {0: gate}, recovery_timeout_s=60.0, node=node if node != "-" else None)
router.update(PlacementTable(version=1, num_groups=4, holders=holders, replicas=replicas))

def counters():
    statistics = Path("/sys/class/net/eth0/statistics")
    return [int((statistics / name).read_text()) for name in ("tx_bytes", "rx_bytes")]

router.route(0, torch.randn(TOKENS, HIDDEN)).result()
before, nodes_before = counters(), router.counters.token_nodes
for _ in range(BATCHES):
    router.route(0, torch.randn(TOKENS, HIDDEN)).result()
sent, received = (after - start for after, start in zip(counters(), before))
width = {"model": 4, "bf16": 2}[wire_dtype]
touched = router.counters.token_nodes - nodes_before
print(json.dumps({"sent": sent / (touched * HIDDEN * width), "received": received / (touched * HIDDEN * width)}))
router.close()
"""


def test_a_token_crosses_to_a_node_once(three_hosts, tmp_path):
    here, *others = three_hosts
    files, processes = [], []
    try:
        for host in others:
            for _ in range(2):
                files.append(tmp_path / f"{len(files)}.address")
                argv = (sys.executable, "-m", "cluster.bench.dispatch_peer", str(files[-1]), host.address)
                processes.append(host.popen(*argv))
        deadline = time.monotonic() + 120
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)

        def ratios(node, wire_dtype):
            argv = (sys.executable, "-c", ROUTER, "b,b,c,c", node, wire_dtype, *map(str, files))
            ran = here.run(*argv)
            assert ran.returncode == 0, ran.stderr
            return json.loads(ran.stdout)

        for wire_dtype in ("model", "bf16"):
            shared = ratios("a", wire_dtype)
            assert 1 <= shared["sent"] <= 1.1, shared
            assert 1 <= shared["received"] <= 1.1, shared
        # Each group by itself: about twice the bytes, as every token has experts in both groups of a node.
        alone = ratios("-", "model")
        assert alone["sent"] > 1.5
        assert alone["received"] > 1.5
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(20)
