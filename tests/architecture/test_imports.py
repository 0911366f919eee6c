"""The import rule: cluster -> router_service -> experts, and each third party behind its one door."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_import_contracts_hold() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_core_imports_without_ray() -> None:
    """Shard, router, gRPC transport, skeleton and engine run on machines that have no Ray."""
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import experts.group, experts.server, router_service.router, router_service.server\n"
        "import router_service.transport.in_process, router_service.transport.grpc_stream\n"
        "import cluster.serving.skeleton, cluster.serving.engine\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
