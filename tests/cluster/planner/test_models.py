from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.planner.models import find_model, model_presets, preset_config
from experts.errors import ConfigError


def test_every_preset_cites_its_source_and_holds_no_counts() -> None:
    assert {"mixtral-8x7b", "deepseek-v3", "kimi-k2", "grok-1", "switch-c"} <= set(model_presets())
    for name in model_presets():
        model = find_model(name)
        assert model.source.startswith("https://")
        assert model.rumoured == (name == "gpt-4-rumoured")
        assert not [key for key in preset_config(name) if "param" in key]


def test_a_directory_and_its_config_json_give_what_the_preset_gives(tmp_path: Path) -> None:
    folder = tmp_path / "my-mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(preset_config("mixtral-8x7b")))
    expected = find_model("mixtral-8x7b").architecture
    for given in (folder, folder / "config.json"):
        model = find_model(str(given))
        assert (model.name, model.architecture) == ("my-mixtral", expected)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"hidden_size": ')
    listing = tmp_path / "list.json"
    listing.write_text("[]")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    for given, message in (
        ("deepseek-v4", "did you mean deepseek-v3|did you mean deepseek-v2"),
        ("zzz", "presets: deepseek"),
        (str(tmp_path), "holds no config.json"),
        (str(broken), "cannot be read as JSON"),
        (str(binary), "cannot be read as JSON"),
        (str(listing), "a JSON object is needed"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_model(given)
