"""The local overlay's serveConfigV2, as it is, through `serve deploy` on a Ray of this machine with its settings."""

import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.bench.processes import child_process, log_tail
from cluster.local_ray import own_haproxy

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
OVERLAY = ROOT / "deploy" / "overlays" / "local"
WAIT_S = 240
# On a busy machine Ray's own processes give up waiting for each other, and then it ends as a whole.
STARTS = 3


@pytest.fixture(scope="module")
def ray_service() -> dict[str, Any]:
    """`spec` of the overlay's RayService."""
    command = next((c for c in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(c[0])), None)
    if command is None:
        pytest.skip("builds an overlay: install kubectl 1.21 or later, or kustomize 4 or later")
    built = subprocess.run([*command, str(OVERLAY)], capture_output=True, text=True, check=True)
    (spec,) = (o["spec"] for o in yaml.safe_load_all(built.stdout) if o["kind"] == "RayService")
    assert isinstance(spec, dict)
    return spec


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """For Ray's sockets: a Unix socket's path may have 107 characters, and pytest's directories use many."""
    with tempfile.TemporaryDirectory(prefix="em-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _until(condition: Callable[[], bool], what: str, log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}:\n{log_tail(log, 40)}"
        threading.Event().wait(0.1)


def _answers(url: str, headers: dict[str, str] | None = None) -> bool:
    try:
        return httpx.get(url, headers=headers).status_code == 200
    except httpx.TransportError:
        return False


def test_serve_deploy_serves_the_demo_model(
    ray_service: dict[str, Any],
    command_environment: dict[str, str],
    free_port: Callable[[], int],
    tmp_path: Path,
    short_directory: Path,
) -> None:
    serve_config = ray_service["serveConfigV2"]
    (head,) = ray_service["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    of_ray = {v["name"]: v["value"] for v in head["env"] if v["name"].startswith("RAY_")}
    port = yaml.safe_load(serve_config)["http_options"]["port"]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            pytest.skip(f"the configuration names port {port}, and something listens there")
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    # Nothing here is worth a graceful drain of the node.
    no_drain = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    environment = {**command_environment, **no_drain, **of_ray, **own_haproxy(str(short_directory))}
    environment["RAY_AUTH_TOKEN_PATH"] = str(token)
    file, log, dashboard = tmp_path / "serve.yaml", tmp_path / "ray.log", free_port()
    file.write_text(serve_config)
    start = (
        "ray", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1",
        f"--port={free_port()}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}", f"--temp-dir={short_directory}", "--disable-usage-stats",
    )  # fmt: skip
    bearer = {"Authorization": f"Bearer {token.read_text()}"}
    deploy = ("serve", "deploy", str(file), "--address", f"http://127.0.0.1:{dashboard}")

    def deployed() -> bool:
        # Ray's dashboard answers before all of its parts do; an operator asks again too.
        with log.open("a") as said:
            done = subprocess.run(deploy, env=environment, cwd=ROOT, stdout=said, stderr=said, timeout=WAIT_S)
        return done.returncode == 0

    for _ in range(STARTS):
        # Paths in the configuration count from where Ray was started.
        with child_process(("env", "-C", str(ROOT), *start), env=environment, log=log) as head_node:

            def or_over(condition: Callable[[], bool], head_node: "subprocess.Popen[str]" = head_node) -> bool:
                return head_node.poll() is not None or condition()

            _until(lambda: or_over(lambda: _answers(f"http://127.0.0.1:{dashboard}/api/version", bearer)), "Ray", log)
            _until(lambda: or_over(deployed), "`serve deploy`", log)
            if head_node.poll() is not None:
                continue
            _until(lambda: _answers(f"http://127.0.0.1:{port}/health"), "the application", log)
            body = {"model": "expertmesh-demo", "prompt": "def main(", "max_tokens": 16, "temperature": 0}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=WAIT_S)
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 16
            assert answer.json()["choices"][0]["text"].strip()
            assert [*short_directory.rglob("haproxy.cfg")], "the manifest chooses HAProxy"
            return
    pytest.fail(f"Ray ended {STARTS} times:\n{log_tail(log, 40)}")
