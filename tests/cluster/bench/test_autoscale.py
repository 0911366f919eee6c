from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.bench.app import app
from cluster.bench.autoscale import AutoscaleBench, Request, Run, summarise
from cluster.bench.autoscale_picture import draw
from cluster.config.load import parse_mesh
from experts.errors import ConfigError


@pytest.fixture
def result() -> Run:
    run = Run(phases=[(0.0, "calm"), (10.0, "peak")])
    for at, engines, groups in ((0, 1, [1, 1]), (12, 2, [1, 1]), (14, 2, [2, 1]), (30, 1, [1, 1])):
        run.samples.append({"at": at, "engines": engines, "groups": groups, "in_flight": 3, "waiting": 1})
    run.requests += [
        Request(sent=1.0, first_token=1.1, done=1.5),
        Request(sent=11.0, first_token=11.2, done=12.0),
        Request(sent=12.0, first_token=12.6, done=14.0),
    ]
    return run


def test_summary_counts_by_phase(result: Run) -> None:
    summary = summarise(result)
    assert (summary["requests"], summary["failures"], summary["outputs_exact"]) == (3, 0, True)
    assert summary["phases"] == [
        {"phase": "calm", "requests": 1, "ttft_ms_p50": 100.0, "e2e_ms_p50": 500.0},
        {"phase": "peak", "requests": 2, "ttft_ms_p50": 400.0, "e2e_ms_p50": 1500.0},
    ]
    assert summary["engines"] == {"first": 1, "most": 2, "last": 1}
    assert summary["groups"] == {"first": [1, 1], "most": [2, 1], "last": [1, 1]}


def test_a_wrong_answer_is_a_failure(result: Run) -> None:
    result.requests.append(Request(sent=20.0, first_token=21.0, done=22.0, error="other output for 'a'"))
    summary = summarise(result)
    assert (summary["failures"], summary["outputs_exact"]) == (1, False)
    assert summary["errors"] == ["other output for 'a'"]
    assert summary["phases"][1]["requests"] == 3


def test_picture(result: Run, tmp_path: Path) -> None:
    draw(result.samples, result.requests, result.phases, tmp_path / "run.png")
    written = (tmp_path / "run.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert len(written) < 100_000


def test_its_mesh_is_valid() -> None:
    config = parse_mesh(AutoscaleBench(groups=3).document(), origin="bench")
    assert config.experts.groups == 3


def test_what_cannot_be_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--checkpoint"):
        AutoscaleBench(checkpoint=tmp_path)
    with pytest.raises(ConfigError, match="--streams"):
        AutoscaleBench(streams=0)
    refused = CliRunner().invoke(app, ["autoscale", "--picture", str(tmp_path / "run.gif")])
    assert isinstance(refused.exception, ConfigError)
    assert "--picture" in str(refused.exception)
