import dataclasses
import json

import pytest
import torch

from experts.errors import ConfigError
from experts.ops import known_cards
from experts.ops.known_cards import KNOWN_CARDS, ROW_BUCKETS, bucket_of, candidates
from experts.ops.slot_format import SlotFormat
from experts.ops.tuning import TileCache, Tuning
from experts.quant.unquantised import Unquantised
from experts.spec import ExpertSpec

FORMAT = SlotFormat(ExpertSpec(hidden_size=64, intermediate_size=32), Unquantised(torch.float16), "silu")


def tuning(cache):
    return Tuning(torch.device("cpu"), "none", torch.float16, cache)


def test_measured_choice_beats_the_default_and_outlives_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(known_cards, "KNOWN_CARDS", {"interpreter": KNOWN_CARDS["H100"]})
    path = tmp_path / "deep" / "tiles.json"
    default = tuning(TileCache(path)).choose(FORMAT.up, 8)
    wanted = candidates("interpreter", "none", 16)[2]
    assert default != wanted

    def measure(config, rows):
        return 1.0 if config == wanted else 2.0 + rows

    outcome = {bucket: (config, ms) for bucket, config, ms in tuning(TileCache(path)).tune(FORMAT.up, measure)}
    assert set(outcome) == set(ROW_BUCKETS)
    assert outcome[16] == (wanted, 1.0)
    assert tuning(TileCache(path)).choose(FORMAT.up, 8) == wanted
    assert tuning(TileCache(path)).choose(FORMAT.down, 8) == default  # another projection, not measured


def test_choices_of_another_triton_are_not_used(tmp_path, monkeypatch):
    path = tmp_path / "tiles.json"
    cache = TileCache(path)
    list(tuning(cache).tune(FORMAT.up, lambda config, rows: 1.0))
    text = path.read_text()
    measured = dataclasses.replace(tuning(TileCache(path)).choose(FORMAT.up, 1), stages=99)
    path.write_text(json.dumps({key: measured.to_json() for key in json.loads(text)}))
    assert tuning(TileCache(path)).choose(FORMAT.up, 1).stages == 99
    monkeypatch.setattr("experts.ops.tuning.triton_version", lambda: "0.0")
    assert tuning(TileCache(path)).choose(FORMAT.up, 1).stages != 99


@pytest.mark.parametrize("text", ["{", "[1]", '{"key": {"rows": 1}}', '{"key": 3}'])
def test_a_broken_cache_is_named(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"tiles\.json.*delete it"):
        TileCache(path)


def test_no_candidate_runs(tmp_path):
    with pytest.raises(ConfigError, match="no tiles for none"):
        list(tuning(TileCache(tmp_path / "tiles.json")).tune(FORMAT.up, lambda config, rows: float("inf")))


@pytest.mark.parametrize(("rows", "bucket"), [(1, 16), (16, 16), (17, 32), (129, 256), (10**6, 256)])
def test_buckets(rows, bucket):
    assert bucket_of(rows) == bucket


def test_every_known_card_has_every_bucket():
    for card, schemes in KNOWN_CARDS.items():
        for scheme in schemes:
            for bucket in ROW_BUCKETS:
                assert candidates(f"NVIDIA {card} 80GB HBM3", scheme, bucket)
