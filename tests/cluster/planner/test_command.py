from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from cluster.planner.command import command
from cluster.planner.models import preset_config
from experts.errors import ConfigError

APP = typer.Typer()
APP.command()(command)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(APP, [*arguments])


def plan_json(*arguments: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run(*arguments, "--json").output)
    return document


def test_json_has_every_figure() -> None:
    plan = plan_json("deepseek-v3", "--nodes", "4", "--price-per-gpu-hour", "2.5")
    assert plan["fits"] is True
    assert (plan["gpus"], plan["nodes"]) == (32, 4)
    assert plan["total_params"] == 671_026_404_352
    assert plan["bytes_per_gpu"] <= plan["memory_per_gpu"]["usable"]
    assert plan["dispatch_bytes_per_token_layer"] == pytest.approx(plan["nodes_per_token"] * 2 * 7168)
    assert plan["dollars_per_million_tokens"] > 0
    assert isinstance(plan["warnings"], list)
    assert plan["binding_constraint"] in plan["decode_step"]
    for key in ("active_params", "expert_bytes", "tokens_per_second"):
        assert plan[key] > 0


def test_what_does_not_fit_exits_with_the_json_and_one_line() -> None:
    result = run("deepseek-v3", "--nodes", "1", "--json")
    assert isinstance(result.exception, ConfigError)  # the CLI prints it and exits with 2
    assert "does not fit" in str(result.exception)
    plan = json.loads(result.output)
    assert plan["fits"] is False
    assert plan["deployment"] is None
    assert plan["suggestions"]


def test_without_nodes_the_fewest_are_taken() -> None:
    assert plan_json("deepseek-v3")["nodes"] == 2
    assert plan_json("mixtral-8x7b")["nodes"] == 1


def test_a_config_json_is_enough(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset_config("mixtral-8x7b")))
    assert plan_json(str(tmp_path))["total_params"] == plan_json("mixtral-8x7b")["total_params"]


def test_the_context_is_never_more_than_the_model_has() -> None:
    assert plan_json("glam-1.2t", "--gpu", "b200")["context"] == 1024


def test_the_table_names_every_part() -> None:
    output = run("kimi-k2", "--gpu", "h200", "--nodes", "2").output
    for part in ("parameters", "Memory of one GPU", "Placement", "Traffic", "decode", "bound by", "1.026T"):
        assert part in output


def test_kustomize_prints_a_patch() -> None:
    operations = yaml.safe_load(run("mixtral-8x22b", "--kustomize").output)
    assert operations[0]["op"] == "test"
    assert "mistralai/Mixtral-8x22B-v0.1" in operations[-1]["value"]


def test_a_picture_is_written(tmp_path: Path) -> None:
    assert run("mixtral-8x7b", "--picture", str(tmp_path / "plan.svg")).exit_code == 0
    assert (tmp_path / "plan.svg").is_file()


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("mixtral-8x7b", "--gpu", "tpu"),
        ("mixtral-8x7b", "--quantization", "int3"),
        ("mixtral-8x7b", "--nodes", "0"),
        ("mixtral-8x7b", "--wire-dtype", "fp4"),
        ("mixtral-8x7b", "--interconnect", "token-ring"),
        ("mixtral-8x7b", "--price-per-gpu-hour", "-1"),
        ("mixtral-8x7b", "--json", "--kustomize"),
        ("mixtral-8x7b", "--context", "99999999"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert "\n" not in str(result.exception)
