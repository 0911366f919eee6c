"""`expertmesh serve` as a person runs it: what it says, what clients see when its engine dies, what it leaves."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import yaml

from cluster.bench.processes import descendants, stop_tree

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
WAIT_S = 180


def _engine(server: "subprocess.Popen[str]") -> int:
    """Process of the engine's replica, by the title that Ray gives it."""
    (engine,) = (
        pid
        for pid, _ in descendants(server.pid)
        if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::ServeReplica:expertmesh:engine")
    )
    return engine


def _open_to_others(server: "subprocess.Popen[str]") -> set[str]:
    """Names of the processes below that listen on more than 127.0.0.1."""
    lines = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    listening = [fields for fields in lines if fields[3] == "0A"]
    sockets = {f"socket:[{fields[9]}]" for fields in listening if not fields[1].split(":")[0].endswith("0100007F")}
    names = set()
    for pid, _ in descendants(server.pid):
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(FileNotFoundError):  # closed since
                if os.readlink(descriptor) in sockets:
                    names.add(Path(f"/proc/{pid}/comm").read_text().strip())
    return names


def _read_until(server: "subprocess.Popen[str]", start: str) -> str:
    lines: list[str] = []
    for line in server.stdout or ():
        lines.append(line)
        if line.startswith(start):
            return "".join(lines)
    pytest.fail("the server ended:\n" + "".join(lines))


def test_from_the_command_to_the_last_process(
    command_environment: dict[str, str],
    tiny_checkpoint: Callable[[str], Path],
    free_port: Callable[[], int],
    tmp_path: Path,
) -> None:
    mesh, port = tmp_path / "mesh.yaml", free_port()
    url = f"http://127.0.0.1:{port}"
    model = {"source": str(tiny_checkpoint("mixtral")), "served_name": "tiny"}
    mesh.write_text(yaml.safe_dump({"model": model, "experts": {"groups": 2}, "router": {"service_port": 0}}))
    server = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "serve", str(mesh), "--port", str(port)],
        env=command_environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said = _read_until(server, "Ctrl-C stops everything")
        for phase in ("model", "Ray", "Serve", "experts and engine", "first completion"):
            assert f"✓ {phase}" in said, said
        assert f"curl -N {url}/v1/completions" in said
        assert re.search(r"^RouterService +127\.0\.0\.1:\d+$", said, re.MULTILINE)
        # Serve's calls between replicas, which want Ray's token.
        assert _open_to_others(server) <= {"ray::ServeRepli"}

        def complete(**fields: object) -> httpx.Response:
            body = {"model": "tiny", "prompt": "hello", "temperature": 0, "ignore_eos": True} | fields
            return httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_S)

        before = complete(max_tokens=8)
        assert before.status_code == 200, before.text

        # The engine dies with an answer half told: that stream breaks. Whoever asks meanwhile waits for the
        # next engine, or is told in OpenAI's shape to come again.
        running = {"model": "tiny", "prompt": "x", "max_tokens": 2000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=running, timeout=WAIT_S) as stream:
            chunks = stream.iter_lines()
            assert next(chunks).startswith("data: ")
            os.kill(_engine(server), signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                list(chunks)
        refused: list[httpx.Response] = []
        until = time.monotonic() + WAIT_S
        while (after := complete(max_tokens=8)).status_code != 200:
            refused.append(after)
            assert time.monotonic() < until
        assert after.json()["choices"] == before.json()["choices"]
        for answer in refused:
            assert answer.status_code == 503, answer.text
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert "repeat the request" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) > 0

        below: dict[int, int] = {}
        for pid, _ in descendants(server.pid):
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                below[pid] = os.pidfd_open(pid)
        assert len(below) > 5

        # A stream that has not ended is told that the engine stops.
        with httpx.stream("POST", f"{url}/v1/completions", json=running, timeout=WAIT_S) as stream:
            chunks = stream.iter_lines()
            assert next(chunks).startswith("data: ")
            server.terminate()
            *_, last = (chunk for chunk in chunks if chunk)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_stopped"
        rest, _ = server.communicate(timeout=WAIT_S)
        assert server.returncode == 0, rest
        assert "Traceback" not in rest
        assert "graceful_shutdown" not in rest
        assert rest.splitlines()[-1] == "stopped"
        for pid, descriptor in below.items():
            assert select.select([descriptor], [], [], 20)[0], f"process {pid} is left"
            os.close(descriptor)
    finally:
        stop_tree(server)


def test_what_still_asks_after_the_end_starts_no_ray(command_environment: dict[str, str]) -> None:
    """As the thread does that deploys, when `serve` is stopped before it is done."""
    program = """
import ray
from cluster.commands.progress import Progress
from cluster.commands.serve_mesh import _ray

with _ray(None, Progress()):
    thing = ray.put(1)
try:
    ray.get(thing)
except ray.exceptions.RaySystemError as error:
    assert "has not been started" in str(error), error
assert not ray.is_initialized()
"""
    command = (sys.executable, "-c", program)
    done = subprocess.run(command, env=command_environment, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
