from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from cluster.bench.serve import ServeBench, command, run, summarise_rows
from experts.errors import ConfigError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 64}))
    return tmp_path


def test_rows_of_a_running_server_beside_an_absent_peer(checkpoint: Path, scripted_server: Any) -> None:
    bench = ServeBench(
        checkpoints=(str(checkpoint),),
        servers=("expertmesh-grpc", "vllm"),
        streams=(1, 3),
        rounds=2,
        prompt_tokens=5,
        output_tokens=3,
        url=scripted_server.url,
    )
    result = run(bench, console=Console(file=io.StringIO()))
    ours_1, ours_3, vllm_1, vllm_3 = result["rows"]
    for row, streams in ((ours_1, 1), (ours_3, 3)):
        assert (row["server"], row["streams"], row["rounds"]) == ("expertmesh-grpc", streams, 2)
        assert row["output_tokens_per_s"] > 0
        assert {"ttft_ms_p50", "itl_ms_p50", "itl_ms_p99"} <= row.keys()
    assert "--vllm-python" in vllm_1["absent"]
    assert "output_tokens_per_s" not in vllm_3
    prompts = [tuple(body["prompt"]) for body in scripted_server.bodies]
    assert len(prompts) == 2 * (1 + 4 + 3 + 4)
    assert len(set(prompts)) == len(prompts)
    assert all(len(prompt) == 5 for prompt in prompts)


def test_summary_divides_ours_by_each_peer() -> None:
    rows = [
        {"server": name, "checkpoint": "mixtral", "streams": streams, "output_tokens_per_s": rate}
        for name, streams, rate in (
            ("expertmesh-grpc", 1, 90.0),
            ("expertmesh-grpc", 16, 300.0),
            ("expertmesh-in_process", 1, 100.0),
            ("vllm", 1, 60.0),
            ("vllm", 16, 200.0),
        )
    ]
    rows.append({"server": "transformers-generate", "checkpoint": "mixtral", "streams": 16, "absent": "why"})
    assert summarise_rows(rows) == {
        "mixtral": {
            "1 streams": {"server": "expertmesh-grpc", "over expertmesh-in_process": 0.9, "over vllm": 1.5},
            "16 streams": {"server": "expertmesh-grpc", "over vllm": 1.5},
        }
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"servers": ("ours",)}, "'ours'"),
        ({"rounds": 0}, "--rounds"),
        ({"streams": (0,)}, "--streams"),
        ({"url": "http://127.0.0.1:1"}, "--checkpoint"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeBench(**settings)


def test_the_command_prints_json_alone_on_stdout(checkpoint: Path, scripted_server: Any) -> None:

    app = typer.Typer()
    app.command()(command)
    arguments = ["--json", "--checkpoint", str(checkpoint), "--server", "expertmesh-grpc", "--url"]
    arguments += [scripted_server.url, "--rounds", "1", "--streams", "1", "--output-tokens", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["rows"][0]["checkpoint"] == str(checkpoint)
    assert document["machine"]["cores"] >= 1
