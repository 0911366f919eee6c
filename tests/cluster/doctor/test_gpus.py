from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.config.mesh import MeshConfig
from cluster.doctor.gpus import check_gpus

MeshFor = Callable[..., MeshConfig]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a nvidia-smi first on the PATH that runs the given shell text."""

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_cuda")
def test_no_gpu_is_fine_until_one_is_asked_for(
    mesh_for: MeshFor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [finding.status for finding in check_gpus(mesh_for(Path("m")), here=True)] == ["ok"]
    wanted = mesh_for(Path("m"), experts={"groups": 2, "num_gpus": 1})
    *_, last = check_gpus(wanted, here=True)
    assert last.status == "fail"
    assert "2 GPUs" in last.found
    assert [finding.status for finding in check_gpus(wanted, here=False)] == ["ok"]


@pytest.mark.usefixtures("no_cuda")
def test_a_driver_that_torch_does_not_go_with(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi('echo "NVIDIA H100 80GB HBM3, 81559 MiB, 550.54.15"')
    first, *_ = check_gpus(None, here=True)
    assert first.status == "warn"
    assert "H100" in first.found
    assert torch.__version__ in first.found


@pytest.mark.usefixtures("no_cuda")
def test_a_driver_that_does_not_answer(nvidia_smi: Callable[[str], None]) -> None:
    nvidia_smi('echo "Failed to initialize NVML: Driver/library version mismatch"; exit 18')
    first, *_ = check_gpus(None, here=True)
    assert first.status == "warn"
    assert "version mismatch" in first.found


def test_cards_are_listed_and_counted(mesh_for: MeshFor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    enough = [*check_gpus(mesh_for(Path("m"), experts={"groups": 1}), here=True)]
    assert [finding.status for finding in enough] == ["ok", "ok"]
    assert "capability 9.0" in enough[0].found
    *_, last = check_gpus(mesh_for(Path("m"), experts={"groups": 4}), here=True)
    assert (last.status, "5 GPUs" in last.found) == ("fail", True)
