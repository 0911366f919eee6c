"""The ports that mesh.yaml names, and whether they can be listened on."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from cluster.config.mesh import MeshConfig


def named_ports(config: MeshConfig) -> Iterator[tuple[str, str, int]]:
    """(key, host, port): http.port, and router.service_port where it is given; the system chooses every other."""
    yield "http.port", config.http.host, config.http.port
    if config.router.service_port:
        yield "router.service_port", "127.0.0.1", config.router.service_port


def port_problem(host: str, port: int) -> str | None:
    """Why this machine cannot listen on host:port, in the system's words; None where it can."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None
