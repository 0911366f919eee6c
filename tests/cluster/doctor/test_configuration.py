from __future__ import annotations

from pathlib import Path

from cluster.doctor.configuration import check_configuration


def test_every_mistake_is_a_finding(tmp_path: Path) -> None:
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text("model: {source: here}\nexperts: {groops: 2}\nhttp: {port: 0}\n")
    findings, config = check_configuration(mesh)
    assert config is None
    assert [finding.status for finding in findings] == ["fail", "fail"]
    assert any("groups" in finding.found for finding in findings)


def test_a_good_one_is_returned(tmp_path: Path) -> None:
    mesh = tmp_path / "mesh.yaml"
    mesh.write_text("model: {source: here}\nexperts: {groups: 3}\n")
    findings, config = check_configuration(mesh)
    assert config is not None
    assert [finding.status for finding in findings] == ["ok"]
    assert "3 expert groups" in findings[0].found
