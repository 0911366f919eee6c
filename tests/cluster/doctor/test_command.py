from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cluster.doctor.command import command, diagnose
from cluster.doctor.finding import Finding

APP = typer.Typer()
APP.command()(command)


def write_mesh(folder: Path, checkpoint: Path, groups: int) -> Path:
    mesh = folder / "mesh.yaml"
    mesh.write_text(f"model: {{source: {checkpoint}}}\nexperts: {{groups: {groups}}}\nhttp: {{port: 49151}}\n")
    return mesh


@pytest.mark.parametrize(("groups", "code"), [(2, 0), (9, 1)])
def test_the_exit_code_says_whether_serving_can_start(checkpoint: Path, tmp_path: Path, groups: int, code: int) -> None:
    mesh = write_mesh(tmp_path, checkpoint, groups)
    result = CliRunner().invoke(APP, [str(mesh), "--json"])
    assert result.exit_code == code
    document = json.loads(result.output)
    assert document["can_serve"] == (code == 0)
    checks = {finding["check"] for finding in document["findings"]}
    expected = {"packages", "config", "gpus", "triton", "shared memory", "model", "settings", "ports", "memory", "ray"}
    assert expected <= checks
    assert all(finding["todo"] for finding in document["findings"] if finding["status"] != "ok")


def test_what_serve_would_refuse_is_a_fail(checkpoint: Path, tmp_path: Path) -> None:
    mesh = write_mesh(tmp_path, checkpoint, 2)
    mesh.write_text(mesh.read_text() + "autoscaling: {experts: {foo: 1}}\n")
    (finding,) = (finding for finding in diagnose(mesh, None) if finding.check == "settings")
    assert finding.status == "fail"
    assert "autoscaling.experts" in finding.found


def test_the_table_says_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(APP, [str(write_mesh(tmp_path, checkpoint, 9))])
    assert "->" in result.output
    assert "Serving cannot start" in result.output


def test_brackets_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding(check="ray", status="fail", found="no [serve]", todo='pip install "ray[serve]"')
    monkeypatch.setattr("cluster.doctor.command.diagnose", lambda mesh, address: [finding])
    output = CliRunner().invoke(APP, []).output
    assert "no [serve]" in output
    assert 'pip install "ray[serve]"' in output


def test_without_a_mesh_only_the_machine_is_checked() -> None:
    checks = {finding.check for finding in diagnose(None, None)}
    assert "ray" in checks
    assert not checks & {"config", "model", "ports"}


def test_a_check_that_breaks_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object, *, here: bool) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file\nmore")

    monkeypatch.setattr("cluster.doctor.command.check_gpus", broken)
    findings = diagnose(None, None)
    assert [f.found for f in findings if f.check == "gpus"] == ["OSError: libcuda.so.1: cannot open shared object file"]
    assert any(finding.check == "ray" for finding in findings)
