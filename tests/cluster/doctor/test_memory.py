from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config.mesh import MeshConfig
from cluster.doctor.memory import check_memory


@pytest.mark.parametrize(("quantization", "factor"), [("none", 2.0), ("int8", 0.55)])
def test_the_weights_widened_against_what_is_free(
    mesh_for: Callable[..., MeshConfig], tmp_path: Path, quantization: str, factor: float
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(10_000))
    mesh = mesh_for(tmp_path)
    mesh = mesh.model_copy(update={"model": mesh.model.model_copy(update={"quantization": quantization})})
    assert [f.status for f in check_memory(mesh, available=int(10_000 * factor) + 1)] == ["ok"]
    assert [f.status for f in check_memory(mesh, available=int(10_000 * factor) - 1)] == ["warn"]


def test_a_hub_id_is_not_guessed_at(mesh_for: Callable[..., MeshConfig]) -> None:
    assert [*check_memory(mesh_for(Path("mistralai/Mixtral-8x7B-v0.1")))] == []


def test_a_cache_beyond_the_machine(mesh_for: Callable[..., MeshConfig], tmp_path: Path) -> None:
    *_, finding = check_memory(mesh_for(tmp_path, engine={"kv_cache_memory": 10**15}))
    assert finding.status == "warn"
    assert "engine.kv_cache_memory" in finding.found
