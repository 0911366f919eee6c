from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cluster.config.mesh import MeshConfig
from cluster.doctor.ray_cluster import check_ray

# Ray asks for a token unless told not to.
OPEN = {**os.environ, "RAY_AUTH_MODE": "disabled"}

MeshFor = Callable[..., MeshConfig]


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    (finding,) = check_ray(None, None)
    assert finding.status == "fail"


def test_more_cpus_than_here(mesh_for: MeshFor) -> None:
    *_, fits = check_ray(mesh_for(Path("m")), None)
    assert fits.status == "ok"
    *_, last = check_ray(mesh_for(Path("m"), engine={"num_cpus": 100_000}), None)
    assert last.status == "fail"


def test_nothing_answers_there() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    *_, last = check_ray(None, address)
    assert last.status == "fail"
    assert address in last.found


@pytest.fixture
def head() -> Iterator[str]:
    """A Ray cluster of one CPU in processes of its own, gone with the test; the address of its head."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # A short path: Ray's sockets lie under it.
    with TemporaryDirectory(prefix="doctor", dir="/tmp", ignore_cleanup_errors=True) as folder:
        arguments = ["start", "--head", "--block", "--num-cpus=1", "--num-gpus=0", "--include-dashboard=false"]
        arguments += [f"--port={port}", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"]
        program = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", *arguments]
        ray = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=OPEN)
        assert ray.stdout is not None
        try:
            started = any("Ray runtime started" in line for line in ray.stdout)
            assert started, "Ray did not start"
            yield f"127.0.0.1:{port}"
        finally:
            ray.terminate()
            ray.communicate(timeout=60)


@pytest.mark.ray
def test_a_cluster_and_what_it_has(head: str, tmp_path: Path) -> None:
    """In a process of its own: joining a cluster changes a process for good."""
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text("model: {source: nowhere}\nexperts: {groups: 2, num_gpus: 1}\n")
    program = "from cluster.cli import main; main()"
    arguments = [sys.executable, "-c", program, "doctor", str(mesh), "--address", head, "--json"]
    answer = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False, env=OPEN)
    assert answer.returncode == 1
    findings = {finding["found"]: finding["status"] for finding in json.loads(answer.stdout)["findings"]}
    assert findings[f"{head}: 1 nodes"] == "ok"
    assert findings["0.3 of the cluster's 1 CPUs are asked for"] == "ok"
    assert findings["2 of the cluster's 0 GPUs are asked for"] == "fail"
