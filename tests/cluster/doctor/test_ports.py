from __future__ import annotations

import socket

from cluster.config.load import parse_mesh
from cluster.config.mesh import MeshConfig
from cluster.doctor.ports import check_ports


def mesh(**sections: object) -> MeshConfig:
    return parse_mesh({"model": {"source": "x"}, **sections}, origin="test")


def test_a_port_that_is_taken_and_then_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (finding,) = check_ports(mesh(http={"port": port}))
        assert finding.status == "fail"
        assert str(port) in finding.found
        *_, finding = check_ports(mesh(router={"service_port": port}))
        assert finding.status == "fail"
        assert "router.service_port" in (finding.todo or "")
    (finding,) = check_ports(mesh(http={"port": port}))
    assert finding.status == "ok"


def test_a_host_that_is_not_this_machine() -> None:
    (finding,) = check_ports(mesh(http={"host": "192.0.2.1"}))
    assert finding.status == "fail"
