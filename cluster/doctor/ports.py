"""Can the ports that mesh.yaml names be listened on?"""

from __future__ import annotations

import socket
from collections.abc import Iterator

from cluster.config.mesh import MeshConfig
from cluster.doctor.finding import Finding


def check_ports(config: MeshConfig) -> Iterator[Finding]:
    """http.port, and router.service_port where it is given; every other port is chosen by the system."""
    yield _check("http.port (or http.host)", config.http.host, config.http.port)
    if config.router.service_port:
        yield _check("router.service_port", "127.0.0.1", config.router.service_port)


def _check(keys: str, host: str, port: int) -> Finding:
    where = f"{host}:{port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return Finding(
            check="ports",
            status="fail",
            found=f"cannot listen on {where}: {error.strerror}",
            todo=f"stop what listens there, or choose another {keys}",
        )
    return Finding(check="ports", status="ok", found=f"{where} is free")
