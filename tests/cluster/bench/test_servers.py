from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import yaml

from cluster.bench.servers import HttpServer, check_name, expertmesh_server, free_port, vllm_server
from cluster.config.mesh import MeshConfig
from experts.errors import ConfigError, MeshError

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_the_generated_configuration_is_valid(tmp_path: Path) -> None:
    server = expertmesh_server("expertmesh-grpc-int8", tmp_path, dtype="float32", groups=2, workdir=tmp_path)
    mesh = MeshConfig.model_validate(yaml.safe_load(Path(server.argv[-1]).read_text()))
    assert (mesh.router.transport, mesh.model.quantization, mesh.experts.groups) == ("grpc", "int8", 2)
    assert server.base_url == f"http://127.0.0.1:{mesh.http.port}"


def test_vllm_sees_none_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    server = vllm_server("vllm", Path("/venv/bin/python"), Path("/model"), dtype="float32")
    assert server.argv[0] == "/venv/bin/python"
    assert "PYTHONPATH" not in server.env
    assert server.env["HF_HUB_OFFLINE"] == "1"


def test_an_unknown_server_is_named() -> None:
    assert check_name("expertmesh-in_process") == "expertmesh-in_process"
    with pytest.raises(ConfigError, match="expertmesh-carrier-pigeon"):
        check_name("expertmesh-carrier-pigeon")


def test_a_server_runs_until_the_block_ends(tmp_path: Path) -> None:
    port = free_port()
    argv = (sys.executable, "-c", SERVER, str(port))
    with HttpServer(name="scripted", argv=argv, env=os.environ, port=port).running(tmp_path) as url:
        assert url == f"http://127.0.0.1:{port}"


def test_a_server_that_ends_at_once_shows_its_log(tmp_path: Path) -> None:
    argv = (sys.executable, "-c", "raise SystemExit('no such checkpoint')")
    server = HttpServer(name="broken", argv=argv, env=os.environ, port=free_port())
    with pytest.raises(MeshError, match=r"ended with code 1(.|\n)*no such checkpoint"), server.running(tmp_path):
        pass
