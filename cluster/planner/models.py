"""From what a user types (a preset's name, a config.json, a checkpoint directory) to an Architecture."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cluster.planner.architecture import Architecture
from cluster.planner.hf_config import read_architecture
from experts.errors import ConfigError

_PRESETS = files("cluster.planner") / "presets" / "models"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model to plan for.

    rumoured: its numbers were never published by whoever trained it
    note:     how its counts compare with the published ones, where that needs a word
    """

    name: str
    source: str
    architecture: Architecture
    rumoured: bool = False
    note: str = ""


@cache
def model_presets() -> tuple[str, ...]:
    """Names of the models whose config.json the planner holds."""
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in _PRESETS.iterdir()))


def preset_config(name: str) -> Mapping[str, Any]:
    """The config.json of a preset."""
    config: Mapping[str, Any] = _preset(name)["config"]
    return config


def find_model(name: str) -> Model:
    """A preset, a config.json, or a directory that holds one.

    Raises ConfigError: neither, or a config.json that is not JSON or not of a Mixture-of-Experts model.
    """
    if name in model_presets():
        preset = _preset(name)
        architecture = read_architecture(preset["config"], f"preset {name}")
        rumoured = bool(preset.get("rumoured", False))
        note = str(preset.get("note", ""))
        return Model(name=name, source=preset["source"], architecture=architecture, rumoured=rumoured, note=note)
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(_unknown(name, path))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise ConfigError(f"{file}: a JSON object is needed, as config.json of a Hugging Face model is")
    label = file.parent.resolve().name if file.name == "config.json" else file.stem
    return Model(name=label, source=str(file), architecture=read_architecture(config, str(file)))


@cache
def _preset(name: str) -> Mapping[str, Any]:
    document: Mapping[str, Any] = yaml.safe_load((_PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    return document


def _unknown(name: str, path: Path) -> str:
    if path.is_dir():
        return f"{name}: the directory holds no config.json; give a checkpoint directory"
    near = difflib.get_close_matches(name, model_presets(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"presets: {', '.join(model_presets())}"
    return f"{name}: neither a preset, nor a config.json, nor a directory with one; {hint}"
