import json

import pytest
import torch
import yaml

from cluster.cli import main
from cluster.commands.warmup import warm_up
from cluster.config.load import load_mesh
from experts.ops import known_cards, tune_backend
from experts.ops.tile_config import TileConfig


@pytest.fixture
def mesh(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("EXPERTMESH_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "mesh.yaml"
    path.write_text(yaml.safe_dump({"model": {"source": str(tiny_checkpoint("mixtral")), "dtype": "float32"}}))
    return path


def test_a_machine_without_a_card_has_nothing_to_tune(mesh, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["warmup", str(mesh)])
    assert stop.value.code == 0
    assert "nothing to compile or tune" in capsys.readouterr().out


def test_choices_are_reported_and_kept(mesh, tmp_path, monkeypatch):
    """In the interpreter, with a clock of our own: what a card would time is checked on a card (tests/bench/gpu.sh)."""
    monkeypatch.setattr(known_cards, "KNOWN_CARDS", {})
    tiles = TileConfig(kernel="decode", rows=64, columns=64, depth=128, warps=4, stages=2)
    monkeypatch.setattr(known_cards, "_ANY", dict.fromkeys(known_cards.ROW_BUCKETS, (tiles,)))
    monkeypatch.setattr("experts.ops.tuning.ROW_BUCKETS", (16,))
    monkeypatch.setattr(tune_backend.tune_backend, "__kwdefaults__", {"measure": lambda run: run() is not None and 1.5})
    lines = []
    warm_up(load_mesh(mesh), torch.device("cpu"), lines.append)
    assert len(lines) == 2
    assert lines[0].startswith("up   up to  16 rows an expert:   1.500 ms with decode tiles 64 x 64 x 128")
    kept = json.loads((tmp_path / "cache" / "tiles.json").read_text())
    assert len(kept) == 2
    assert all("float32" in key for key in kept)
