"""Accelerators and what joins their nodes: presets, and a YAML for your own."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from experts.errors import ConfigError

_PRESETS = files("cluster.planner") / "presets"
_Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One accelerator: bytes, bytes/s, FLOP/s without sparsity. `fp8_flops` is None without fp8 units."""

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None
    gpus_per_node: int
    interconnect: str
    kubernetes_resource: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Interconnect:
    """What joins nodes: bytes/s that one node can send, and receive, at once."""

    name: str
    bytes_per_s: float


class _GpuEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    memory_gib: _Positive
    memory_tb_per_s: _Positive
    bf16_tflops: _Positive
    fp8_tflops: _Positive | None = None
    gpus_per_node: Annotated[int, Field(ge=1)] = 8
    interconnect: str = "ethernet-100g"
    kubernetes_resource: str = "nvidia.com/gpu"
    source: str = ""


class _InterconnectEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    gigabytes_per_s: _Positive
    source: str = ""


_GPU_ENTRIES = TypeAdapter(dict[str, _GpuEntry])
_INTERCONNECT_ENTRIES = TypeAdapter(dict[str, _InterconnectEntry])


@cache
def gpu_presets() -> dict[str, Gpu]:
    """The accelerators that the planner knows, by name."""
    return _gpus(yaml.safe_load((_PRESETS / "gpus.yaml").read_text(encoding="utf-8")), "gpus.yaml")


@cache
def interconnect_presets() -> dict[str, Interconnect]:
    """The interconnects that the planner knows, by name."""
    document = yaml.safe_load((_PRESETS / "interconnects.yaml").read_text(encoding="utf-8"))
    entries = _INTERCONNECT_ENTRIES.validate_python(document)
    return {name: Interconnect(name=name, bytes_per_s=e.gigabytes_per_s * 1e9) for name, e in entries.items()}


def find_gpu(name: str) -> Gpu:
    """A preset's accelerator, or the only one of a YAML file with a preset's keys.

    Raises ConfigError: no such preset or file, or a file that is not as presets/gpus.yaml is.
    """
    presets = gpu_presets()
    if name in presets:
        return presets[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--gpu {name}: neither a preset nor a YAML file; {_nearest(name, list(presets))}")
    try:
        own = _gpus(yaml.safe_load(path.read_text(encoding="utf-8")), name)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--gpu {name}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if len(own) != 1:
        raise ConfigError(f"--gpu {name}: the file describes {len(own)} cards, one is needed")
    return next(iter(own.values()))


def find_interconnect(name: str) -> Interconnect:
    """A preset's interconnect. Raises ConfigError where there is none of that name."""
    presets = interconnect_presets()
    if name not in presets:
        raise ConfigError(f"--interconnect {name}: {_nearest(name, list(presets))}")
    return presets[name]


def _gpus(document: Any, origin: str) -> dict[str, Gpu]:
    try:
        entries = _GPU_ENTRIES.validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        wrong = "expected a card's keys, as `mine: {memory_gib: 24, memory_tb_per_s: 1, bf16_tflops: 165}`"
        if first["type"] not in ("dict_type", "model_type"):
            wrong = f"{first['msg']}; keys are those of cluster/planner/presets/gpus.yaml"
        raise ConfigError(f"--gpu {origin}: {where}: {wrong}") from None
    return {
        name: Gpu(
            name=name,
            memory_bytes=int(entry.memory_gib * 2**30),
            memory_bytes_per_s=entry.memory_tb_per_s * 1e12,
            bf16_flops=entry.bf16_tflops * 1e12,
            fp8_flops=None if entry.fp8_tflops is None else entry.fp8_tflops * 1e12,
            gpus_per_node=entry.gpus_per_node,
            interconnect=entry.interconnect,
            kubernetes_resource=entry.kubernetes_resource,
        )
        for name, entry in entries.items()
    }


def _nearest(name: str, known: list[str]) -> str:
    begun = [each for each in known if name and each.startswith(name)]
    near = begun or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
