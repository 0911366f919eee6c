import json

import pytest
import torch

from experts.errors import ConfigError
from experts.ops import known_cards
from experts.ops.expert_mlp import expert_mlp_reference
from experts.ops.tile_config import TileConfig
from experts.ops.triton_backend import TritonBackend
from experts.ops.tune_backend import tune_backend
from experts.spec import ExpertSpec, ExpertWeights


@pytest.fixture
def two_candidates(monkeypatch, tmp_path, on_card):
    monkeypatch.setenv("EXPERTMESH_CACHE_DIR", str(tmp_path))
    slow, fast = (TileConfig(kernel="decode", rows=16, columns=c, depth=128, warps=4, stages=2) for c in (64, 128))
    card = torch.cuda.get_device_name() if on_card else "interpreter"
    buckets = dict.fromkeys((16,), (slow, fast))
    monkeypatch.setattr(known_cards, "KNOWN_CARDS", {card: {"none": buckets}})
    monkeypatch.setattr("experts.ops.tuning.ROW_BUCKETS", (16,))
    return slow, fast, tmp_path / "tiles.json"


def test_the_fastest_is_kept_and_used(device, error, two_candidates, monkeypatch):
    _, fast, path = two_candidates
    monkeypatch.setattr(TritonBackend, "warm", lambda self, slot: None)
    generator = torch.Generator().manual_seed(0)
    spec = ExpertSpec(hidden_size=64, intermediate_size=40)
    weights = ExpertWeights(
        up_2IH=torch.randn(80, 64, generator=generator).half() / 8,
        down_HI=torch.randn(64, 40, generator=generator).half() / 6,
    )
    backend = TritonBackend(spec, device=device, dtype=torch.float16, quantization="none")
    backend.load(3, weights)
    ran = []

    def measure(run):
        ran.append(run())
        return 1.0 if len(ran) % 2 == 0 else 2.0

    steps = list(tune_backend(backend, [3], dtype=torch.float16, measure=measure))
    assert [(step.projection, step.rows, step.config) for step in steps] == [("up", 16, fast), ("down", 16, fast)]
    assert [tuple(out.shape) for out in ran] == [(16, 40)] * 2 + [(16, 64)] * 2
    assert len(json.loads(path.read_text())) == 2
    fresh = TritonBackend(spec, device=device, dtype=torch.float16, quantization="none")
    fresh.load(0, weights)
    assert [fresh.tuning.choose(projection, 4) for projection in fresh.projections] == [fast, fast]
    hidden = torch.randn(2, 64, generator=generator).half()
    call = (torch.tensor([0, 2]).int(), torch.tensor([0, 1]).int(), torch.ones(2))
    partial = fresh.forward(hidden, torch.zeros(1).int(), *call)
    assert error(partial, expert_mlp_reference(spec, [weights], hidden, *call)) < 2e-3


def test_a_damaged_cache_stops_the_backend(device, two_candidates):
    *_, path = two_candidates
    path.write_text("{")
    backend = TritonBackend(
        ExpertSpec(hidden_size=64, intermediate_size=40), device=device, dtype=torch.float16, quantization="none"
    )
    with pytest.raises(ConfigError, match=r"tiles\.json"):
        backend.load(0, ExpertWeights(up_2IH=torch.zeros(80, 64), down_HI=torch.zeros(64, 40)))
