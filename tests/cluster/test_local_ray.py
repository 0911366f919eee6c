"""What a client reads from the proxy while no engine answers."""

import json
from pathlib import Path

import pytest
from openai.types.shared import ErrorObject

from cluster.local_ray import shape_proxy_errors


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
