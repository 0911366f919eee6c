"""The local overlay's serveConfigV2, taken out of the RayService as it is, serves the demo model on a Ray here."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def wait_for(process: subprocess.Popen[str], url: str, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "Ray ended"
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"{url} did not answer within {seconds:.0f} s")


@pytest.fixture
def ray_here() -> Iterator[tuple[str, dict[str, str], subprocess.Popen[str]]]:
    """A Ray cluster of one node, started at the repository's root: its dashboard's address, environment, process."""
    port, dashboard, agent, client = free_ports(4)
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={directory}"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--ray-client-server-port={client}"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            wait_for(process, f"{address}/api/version")
            yield address, environment, process
        finally:
            # `ray stop` would stop every Ray on this machine; this one's processes are in a session of their own.
            subprocess.run(["pkill", "-KILL", "--session", str(process.pid)], check=False)
            process.wait(60)


@pytest.mark.timeout(900)
@pytest.mark.ray
def test_serve_deploy_of_the_text_as_it_is_serves_the_demo_model(ray_here, build, tmp_path):
    address, environment, process = ray_here
    objects = build(ROOT / "deploy" / "overlays" / "local")
    (text,) = (o["spec"]["serveConfigV2"] for o in objects if o["kind"] == "RayService")
    path = tmp_path / "serve.yaml"
    http_port = 8000
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", http_port)) == 0:  # taken here: that one number is changed
            (http_port,) = free_ports(1)
    path.write_text(text.replace("port: 8000", f"port: {http_port}"))
    url = f"http://127.0.0.1:{http_port}"
    deploy = [BIN / "serve", "deploy", path, "--address", address]
    for _ in range(5):  # right after its start Ray's dashboard may answer 500; deploying again is harmless
        result = subprocess.run(deploy, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            break
    assert result.returncode == 0, result.stdout + result.stderr
    wait_for(process, f"{url}/health")
    request = {"model": "expertmesh-demo", "prompt": "def ", "max_tokens": 8, "temperature": 0}
    answers = [httpx.post(f"{url}/v1/completions", json=request, timeout=60).json() for _ in range(2)]
    assert answers[0]["usage"]["completion_tokens"] == 8
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
