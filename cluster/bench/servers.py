"""How each server of the serving benchmark is started, and how one knows that it is ready."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from cluster.bench.checkpoints import MAX_MODEL_LEN
from cluster.bench.processes import child_process, log_tail
from experts.errors import ConfigError, MeshError

READY_TIMEOUT_S = 600.0
OURS = re.compile(r"expertmesh-(?P<transport>in_process|grpc|ray)(-(?P<quantization>fp8|int8|int4|fp16))?")
PEERS = ("vllm", "vllm-bfloat16", "transformers-generate", "transformers-continuous")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpServer:
    """A server to start: `argv` makes it listen on 127.0.0.1:`port`."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    port: int

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def running(self, workdir: Path) -> Iterator[str]:
        """Starts it, waits until it lists its model, yields its base URL, and stops all of it.

        Raises MeshError with the end of its log if it ends or is not ready within READY_TIMEOUT_S.
        """
        log = workdir / f"{self.name}.log"
        with child_process(self.argv, env=self.env, log=log) as process:
            _wait_until_ready(self.base_url, process, log)
            yield self.base_url


def check_name(name: str) -> str:
    """`name` if it is one of ours or a peer's; raises ConfigError otherwise."""
    if name in PEERS or OURS.fullmatch(name):
        return name
    raise ConfigError(
        f"unknown server {name!r}: expertmesh-<in_process|grpc|ray>[-<fp8|int8|int4|fp16>], "
        f"or one of {', '.join(PEERS)}"
    )


def expertmesh_server(name: str, checkpoint: Path, *, dtype: str, groups: int, workdir: Path) -> HttpServer:
    """`expertmesh serve` with a mesh.yaml of its own in `workdir`."""
    match = OURS.fullmatch(name)
    assert match is not None
    port = free_port()
    mesh = {
        "model": {
            "source": str(checkpoint),
            "dtype": dtype,
            "quantization": match["quantization"] or "none",
        },
        "experts": {"groups": groups, "device": "cpu"},
        "router": {"transport": match["transport"]},
        "engine": {"max_model_len": MAX_MODEL_LEN, "device": "cpu"},
        "http": {"host": "127.0.0.1", "port": port},
    }
    path = workdir / f"{name}.yaml"
    path.write_text(yaml.safe_dump(mesh, sort_keys=False))
    argv = (sys.executable, "-c", "from cluster.cli import main; main()", "serve", str(path))
    return HttpServer(name=name, argv=argv, env={**os.environ, **OFFLINE}, port=port)


def vllm_server(name: str, python: Path, checkpoint: Path, *, dtype: str) -> HttpServer:
    """vLLM's OpenAI server for CPU, run by the interpreter of the environment that it is installed in."""
    port = free_port()
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    env |= OFFLINE
    env |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_NO_USAGE_STATS": "1",
    }
    # vLLM's CPU guide asks for Intel's OpenMP to be preloaded; its wheel brings the library along.
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        env["LD_PRELOAD"] = str(openmp)
    argv = (
        str(python), "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(checkpoint), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", dtype, "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "64",
    )  # fmt: skip
    return HttpServer(name=name, argv=argv, env=env, port=port)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _wait_until_ready(base_url: str, process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise MeshError(f"ended with code {process.returncode} before it was ready:\n{log_tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{base_url}/v1/models", timeout=5).status_code == 200:
                return
        time.sleep(0.25)
    raise MeshError(f"not ready after {READY_TIMEOUT_S:.0f} s:\n{log_tail(log)}")
