"""Can the ports that mesh.yaml names be listened on?"""

from __future__ import annotations

from collections.abc import Iterator

from cluster.config.mesh import MeshConfig
from cluster.doctor.finding import Finding
from cluster.listen_ports import named_ports, port_problem


def check_ports(config: MeshConfig) -> Iterator[Finding]:
    """A finding for each."""
    for key, host, port in named_ports(config):
        if problem := port_problem(host, port):
            yield Finding(
                check="ports",
                status="fail",
                found=f"cannot listen on {host}:{port}: {problem}",
                todo=f"stop what listens there, or choose another {key}{' (or http.host)' * (key == 'http.port')}",
            )
        else:
            yield Finding(check="ports", status="ok", found=f"{host}:{port} is free")
