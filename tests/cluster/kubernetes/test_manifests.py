import io
from pathlib import Path

import pytest

from cluster.kubernetes.manifests import read_manifests
from experts.errors import ConfigError

TWO = """
apiVersion: ray.io/v1
kind: RayService
metadata: {name: mesh}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
---
apiVersion: v1
kind: Namespace
metadata: {name: expertmesh}
"""


def test_what_others_need_comes_first(tmp_path, monkeypatch):
    path = tmp_path / "all.yaml"
    path.write_text(TWO)
    assert [o["kind"] for o in read_manifests(str(path))] == ["Namespace", "ConfigMap", "RayService"]
    monkeypatch.setattr("sys.stdin", io.StringIO(TWO))
    assert len(read_manifests("-")) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no object in it"),
        ("a: [", "not valid YAML"),
        ("kind: Pod\nmetadata: {name: x}", "document 1 lacks apiVersion, kind or metadata.name"),
        ("- a\n- b", "document 1 lacks"),
    ],
)
def test_what_is_no_manifest(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_manifests(str(path))


def test_a_directory_is_built(tmp_path, monkeypatch):
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]")
    builder = tmp_path / "bin" / "kustomize"
    builder.parent.mkdir()
    builder.write_text('#!/bin/sh\n[ -f "$2/kustomization.yaml" ] && cat "$2/all.yaml"\n')
    builder.chmod(0o755)
    monkeypatch.setenv("PATH", f"{builder.parent}:/usr/bin:/bin")
    (tmp_path / "all.yaml").write_text(TWO)
    assert len(read_manifests(str(tmp_path))) == 3
    (tmp_path / "kustomization.yaml").unlink()
    with pytest.raises(ConfigError, match="kustomize build"):
        read_manifests(str(tmp_path))
    monkeypatch.setenv("PATH", str(Path("/nonexistent")))
    with pytest.raises(ConfigError, match="neither kustomize nor kubectl is installed"):
        read_manifests(str(tmp_path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_manifests(str(tmp_path / "nothing.yaml"))
