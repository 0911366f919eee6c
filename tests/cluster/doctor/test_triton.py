from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from cluster.doctor.triton import check_triton


def absent(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(("gpu", "status"), [(True, "fail"), (False, "ok")])
def test_without_triton(monkeypatch: pytest.MonkeyPatch, gpu: bool, status: str) -> None:
    monkeypatch.setattr(metadata, "version", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    (finding,) = check_triton()
    assert finding.status == status


def test_a_gpu_needs_a_compiler_and_a_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "3.7.1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda place, mode: False)
    assert [finding.status for finding in check_triton()] == ["ok", "fail", "fail"]
    monkeypatch.setenv("CC", "/opt/cc")
    monkeypatch.setattr("os.access", lambda place, mode: True)
    assert [finding.status for finding in check_triton()] == ["ok"]
