"""What a user gives wrongly on the command line: exit code 2 and readable lines, never a traceback."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def expertmesh(command_environment: dict[str, str]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments],
            capture_output=True,
            text=True,
            env=command_environment,
            cwd=ROOT,
            timeout=120,
            check=False,
        )

    return run


def _mesh(tmp_path: Path, source: object, extra: str = "") -> str:
    path = tmp_path / "mesh.yaml"
    path.write_text(f"model:\n  source: {source}\n{extra}")
    return str(path)


def _assert_refused(result: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr, result.stderr


def test_unknown_key(expertmesh: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path) -> None:
    path = _mesh(tmp_path, "x", "exprts:\n  groups: 2\n")
    _assert_refused(expertmesh("serve", path), f"{path}:3", "exprts", "did you mean `experts`?")


def test_missing_checkpoint(expertmesh: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path) -> None:
    _assert_refused(expertmesh("serve", _mesh(tmp_path, "./nowhere/at-all")), "nowhere/at-all", "model.source")


def test_corrupt_safetensors_names_file_and_what_to_do(
    expertmesh: Callable[..., "subprocess.CompletedProcess[str]"],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in tiny_checkpoint("mixtral").iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    _assert_refused(expertmesh("serve", _mesh(tmp_path, damaged)), "model.safetensors", "truncated")


def test_impossible_group_count(
    expertmesh: Callable[..., "subprocess.CompletedProcess[str]"],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = _mesh(tmp_path, tiny_checkpoint("mixtral"), "experts:\n  groups: 9\n")
    _assert_refused(expertmesh("serve", path), "experts.groups is 9", "at most 4")


def test_port_taken(
    expertmesh: Callable[..., "subprocess.CompletedProcess[str]"],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = _mesh(tmp_path, tiny_checkpoint("mixtral"), "experts:\n  groups: 2\n")
        _assert_refused(expertmesh("serve", path, "--port", str(port)), str(port), "--port")


def test_nothing_listens(expertmesh: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    _assert_refused(expertmesh("generate", "hello", "--url", url), url, "expertmesh serve")


def test_what_the_engine_would_refuse_is_refused_before_ray_starts(
    expertmesh: Callable[..., "subprocess.CompletedProcess[str]"],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys"
    keys.write_bytes(b"\xff\xfe\x00")
    extra = f"engine:\n  max_model_len: 100000000\nhttp:\n  api_keys_file: {keys}\n"
    path = _mesh(tmp_path, tiny_checkpoint("mixtral"), extra)
    result = expertmesh("serve", path)
    _assert_refused(result, path, "engine.max_model_len", f"http.api_keys_file: {keys}: ")
    assert "Ray" not in result.stderr


def test_no_ray_listens(
    expertmesh: Callable[..., "subprocess.CompletedProcess[str]"],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        for command in (["status"], ["serve", _mesh(tmp_path, tiny_checkpoint("mixtral"))]):
            result = expertmesh(*command, "--address", address)
            _assert_refused(result, address, "Connection refused", "--address")
            assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("url", ["http://[::1", "", "ftp://127.0.0.1"])
def test_a_url_that_is_none(expertmesh: Callable[..., "subprocess.CompletedProcess[str]"], url: str) -> None:
    result = expertmesh("generate", "hello", "--url", url)
    _assert_refused(result, url)
    assert len(result.stderr.splitlines()) == 1


def test_a_key_that_no_header_carries(
    expertmesh: Callable[..., "subprocess.CompletedProcess[str]"], command_environment: dict[str, str]
) -> None:
    command_environment["OPENAI_API_KEY"] = "ключ"
    try:
        _assert_refused(expertmesh("generate", "hello"), "OPENAI_API_KEY", "ASCII")
    finally:
        del command_environment["OPENAI_API_KEY"]


def test_unknown_command_and_flag(expertmesh: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    _assert_refused(expertmesh("sevre"), "sevre")
    _assert_refused(expertmesh("generate", "hello", "--max-tokens", "-3"), "max-tokens")


def test_version_and_help(expertmesh: Callable[..., "subprocess.CompletedProcess[str]"]) -> None:
    assert expertmesh("version").stdout.strip()
    for command in ("serve", "generate", "status", "plan", "doctor", "bench", "k8s", "version"):
        assert command in expertmesh("--help").stdout
