"""The client of the README runs as it is printed."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import torch

from experts.server import ExpertServer
from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec
from router_service.router import Router
from router_service.server import RouterServer
from router_service.transport.grpc_stream import GrpcTransport

ROOT = Path(__file__).parents[2]


def test_the_client_runs_a_layer(make_mesh, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "router_service/README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 60
    client = tmp_path / "client.py"
    client.write_text(code)
    mesh = make_mesh(num_groups=1, layers=(3,))
    expert = ExpertServer(mesh.groups[mesh.replica(0)])
    expert.start()
    gate = build_gate(GateSpec(system="mixtral", num_experts=16, num_experts_per_tok=2), torch.randn(16, 8), None)
    router = Router(GrpcTransport(), {3: gate}, recovery_timeout_s=10.0)
    replica = dataclasses.replace(mesh.table.replicas[0], address=expert.address)
    router.update(dataclasses.replace(mesh.table, replicas=(replica,)))
    server = RouterServer(router)
    server.start()
    try:
        ran = subprocess.run(
            [sys.executable, str(client), server.address, "3", "8"],
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        server.stop(0)
        router.close()
        expert.stop(0)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "gated there: (4, 8)",
        "gated here: (4, 8)",
        "streamed: (4, 8)",
        "streamed: (4, 8)",
    ]
