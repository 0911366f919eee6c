"""mesh.yaml: every mistake is answered with file, line, key and what to do."""

from pathlib import Path

import pytest
import yaml

from cluster.config.load import load_mesh, parse_mesh
from experts.errors import ConfigError

VALID = "model:\n  source: some/model\nexperts:\n  groups: 2\n"


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_and_values(tmp_path: Path) -> None:
    config = load_mesh(_write(tmp_path, VALID))
    assert config.experts.groups == 2
    assert config.router.transport == "grpc"
    assert config.model.source == "some/model"


def test_relative_source_is_found_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir("/")
    config = load_mesh(_write(tmp_path, "model:\n  source: checkpoint\n"))
    assert config.model.source == str(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("model:\n  source: x\nexperts:\n  grups: 2\n", 4, ("experts.grups", "did you mean `groups`")),
        ("model:\n  source: x\nexprts:\n  groups: 2\n", 3, ("exprts", "did you mean `experts`")),
        ("model:\n  source: x\nexperts:\n  groups: 0\n", 4, ("experts.groups", "greater than or equal to 1")),
        ("model:\n  source: x\nengine:\n  max_model_len: soon\n", 4, ("engine.max_model_len", "soon")),
        ("model:\n  source: x\nrouter:\n  transport: pigeon\n", 4, ("router.transport", "grpc")),
        ("model:\n  dtype: float32\n", 1, ("model.source", "missing")),
        ("model:\n  source: x\nhttp:\n  port: 99999\n", 4, ("http.port", "65535")),
        (
            "model:\n  source: x\nengine:\n  enable_dbo: true\nrouter:\n  transport: in_process\n",
            4,
            ("engine.enable_dbo", "router.transport"),
        ),
        (
            "model:\n  source: x\nexperts:\n  num_redundant_experts: 2\nrouter:\n  transport: in_process\n",
            4,
            ("experts.num_redundant_experts", "router.transport", "leave one of the two out"),
        ),
        (
            "model:\n  source: x\nrouter:\n  transport: in_process\n  max_nodes_per_token: 1\n",
            5,
            ("router.max_nodes_per_token", "router.transport", "leave one of the two out"),
        ),
        (
            "model:\n  source: x\nrouter:\n  transport: in_process\n  wire_dtype: bf16\n",
            5,
            ("router.wire_dtype", "router.transport: in_process", "leave one of the two out"),
        ),
        (
            "model:\n  source: x\nrouter:\n  node_limit_mode: restrict\n",
            4,
            ("router.node_limit_mode", "give `router.max_nodes_per_token`"),
        ),
        (
            "model:\n  source: x\nrouter:\n  overflow: next_best\n",
            4,
            ("router.overflow", "give `router.capacity_factor`"),
        ),
        (
            "model:\n  source: x\nengine:\n  max_num_seqs: 64\n  max_num_batched_tokens: 2\n",
            5,
            ("engine.max_num_batched_tokens", "engine.max_num_seqs"),
        ),
        (
            "model:\n  source: x\nrouter:\n  service_port: 9000\nhttp:\n  port: 9000\n",
            4,
            ("router.service_port", "`http.port` too"),
        ),
        ("model:\n  source: x\nrouter:\n", 3, ("`router` is a section", "leave it out")),
        ("model:\n  source: x\nrouter: {transport: grpc\n", 4, ("not valid YAML", "flow mapping")),
        ("model:\n  source: ''\n", 2, ("model.source", "at least 1 character")),
        ("model:\n  source: x\nhttp:\n  host: ''\n", 4, ("http.host", "at least 1 character")),
        ("model:\n  source: x\nexperts:\n  groups: yes\n", 4, ("experts.groups", "truth value")),
        ("model:\n  source: x\nexperts:\n  num_gpus: -1\n", 4, ("experts.num_gpus", "greater than or equal to 0")),
        ("model:\n  source: x\nrouter:\n  recovery_timeout_s: .inf\n", 4, ("recovery_timeout_s", "finite")),
        ("model:\n  source: x\nhttp:\n  port: 1\n  port: 2\n", 5, ("`port` is given twice",)),
        ("model:\n  source: x\nhttp:\n  qqqqqqqq: 1\n", 4, ("http.qqqqqqqq", "valid keys here: host, port")),
    ],
)
def test_a_mistake_names_file_line_key_and_remedy(tmp_path: Path, text: str, line: int, parts: tuple[str, ...]) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_mesh(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    for part in parts:
        assert part in message


def test_what_no_reader_can_follow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nested too deeply"):
        load_mesh(_write(tmp_path, "model: " + "{a: " * 3000 + "1" + "}" * 3000))
    # Nine times nine times nine ... strings: the message must not hold them all.
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}' if n else 'x'] * 9)}]\n" for n in range(9)]
    with pytest.raises(ConfigError, match=r"model\.source") as caught:
        load_mesh(_write(tmp_path, "".join(levels) + "model: {source: *l8}\n"))
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    "router",
    [
        "{transport: grpc, wire_dtype: fp8, max_nodes_per_token: 2, node_limit_mode: restrict}",
        "{transport: grpc, capacity_factor: 1.5, overflow: next_best}",
        "{transport: ray, wire_dtype: bf16, max_nodes_per_token: 2}",
        "{transport: in_process, wire_dtype: model, node_limit_mode: exact, capacity_factor: 1, overflow: drop}",
    ],
)
def test_what_goes_together_is_taken(tmp_path: Path, router: str) -> None:
    load_mesh(_write(tmp_path, f"model: {{source: x}}\nrouter: {router}\n"))


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_mesh(_write(tmp_path, "model:\n  sauce: x\nhttp:\n  port: 0\n"))
    assert len(str(caught.value).splitlines()) == 3
    with pytest.raises(ConfigError) as caught:
        load_mesh(_write(tmp_path, "model: {source: x}\nrouter: {overflow: next_best, node_limit_mode: restrict}\n"))
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["model: [", "- 1\n", "", "\tmodel: 1"])
def test_what_is_no_mapping_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_mesh(_write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 1


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_mesh(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_mesh(tmp_path / "binary.yaml")


def test_the_same_document_as_serve_args() -> None:
    with pytest.raises(ConfigError, match=r"^args: unknown key `model\.sourc`; did you mean `source`"):
        parse_mesh({"model": {"source": "x", "sourc": "y"}}, origin="args")
    assert parse_mesh(yaml.safe_load(VALID), origin="args").experts.groups == 2
