"""What a client reads from the proxy while no engine answers."""

import json
import socket
from pathlib import Path

import pytest
from openai.types.shared import ErrorObject

from cluster.local_ray import own_haproxy, shape_proxy_errors


def test_the_proxys_own_errors_are_openais(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", str(tmp_path / "haproxy.cfg"))
    shape_proxy_errors()  # Serve's proxy has not written its page yet
    (tmp_path / "node").mkdir()
    page = tmp_path / "node" / "500.http"
    page.write_text("HTTP/1.1 500 Internal Server Error\r\n\r\n")
    shape_proxy_errors()
    head, _, body = page.read_bytes().partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    assert status == "HTTP/1.1 503 Service Unavailable"
    headers = dict(line.split(": ") for line in lines)
    assert headers["Content-Length"] == str(len(body))
    assert headers["Content-Type"] == "application/json"
    assert int(headers["Retry-After"]) > 0
    error = ErrorObject.model_validate(json.loads(body)["error"], strict=True)
    assert error.type == "service_unavailable_error"
    assert "repeat the request" in error.message


def test_ports_are_free_and_given_to_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        number = taken.getsockname()[1]
        monkeypatch.setattr("random.sample", lambda ports, count: [number, *ports[:count]])
        environment = own_haproxy(str(tmp_path))
    ports = [int(value) for name, value in environment.items() if name.endswith("_PORT")]
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len(set(ports)) == 3
    assert all(10_000 <= port < given and port != number for port in ports)
