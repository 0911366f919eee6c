"""Can the HTTP port be listened on?"""

from __future__ import annotations

import socket
from collections.abc import Iterator

from cluster.config.mesh import HttpConfig
from cluster.doctor.finding import Finding


def check_ports(http: HttpConfig) -> Iterator[Finding]:
    """http.host:http.port; every other port is chosen by the system."""
    where = f"{http.host}:{http.port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(http.host, http.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        yield Finding(
            check="ports",
            status="fail",
            found=f"cannot listen on {where}: {error.strerror}",
            todo="stop what listens there, or choose another http.port (or http.host)",
        )
    else:
        yield Finding(check="ports", status="ok", found=f"{where} is free")
