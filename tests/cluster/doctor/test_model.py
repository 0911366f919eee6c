from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from cluster.config.mesh import MeshConfig
from cluster.doctor.model import check_model_files

MeshFor = Callable[..., MeshConfig]


def test_a_whole_checkpoint_is_ok_and_a_missing_tokenizer_a_warning(checkpoint: Path, mesh_for: MeshFor) -> None:
    findings = [*check_model_files(mesh_for(checkpoint, experts={"groups": 4}))]
    assert [finding.status for finding in findings] == ["ok", "warn"]
    assert "8 experts in 2 layers" in findings[0].found


def test_more_groups_than_experts(checkpoint: Path, mesh_for: MeshFor) -> None:
    (finding,) = check_model_files(mesh_for(checkpoint, experts={"groups": 5}))
    assert finding.status == "fail"
    assert "experts.groups" in finding.found


def test_a_capacity_for_a_gate_of_transformers_own(
    tiny_checkpoint: Callable[[str], Path], checkpoint: Path, mesh_for: MeshFor
) -> None:
    router = {"capacity_factor": 1.5}
    (finding,) = check_model_files(mesh_for(tiny_checkpoint("olmoe"), router=router))
    assert finding.status == "fail"
    assert "router.capacity_factor" in finding.found
    assert [finding.status for finding in check_model_files(mesh_for(checkpoint, router=router))] == ["ok", "warn"]


def test_a_truncated_file_is_named(checkpoint: Path, mesh_for: MeshFor, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (finding,) = check_model_files(mesh_for(broken))
    assert finding.status == "fail"
    assert "model.safetensors" in finding.found


def test_no_such_directory(mesh_for: MeshFor, tmp_path: Path) -> None:
    (finding,) = check_model_files(mesh_for(tmp_path / "nowhere"))
    assert finding.status == "fail"
    assert "nowhere" in finding.found
