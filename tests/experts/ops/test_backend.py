"""Backends by device."""

from __future__ import annotations

import pytest
import torch

from experts.errors import ConfigError
from experts.ops.backend import ExpertBackend, build_backend
from experts.ops.cpu_backend import CpuBackend
from experts.spec import ExpertSpec

SPEC = ExpertSpec(hidden_size=4, intermediate_size=4)


def build(device: str, quantization: str = "none") -> ExpertBackend:
    return build_backend(
        SPEC, device=torch.device(device), dtype=torch.bfloat16, quantization=quantization, num_threads=1
    )


def test_cpu() -> None:
    backend = build("cpu")
    assert isinstance(backend, CpuBackend)
    assert backend.device.type == "cpu"


def test_impossible_devices_and_schemes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts\.device: no backend for 'meta'"):
        build("meta")
    with pytest.raises(
        ConfigError, match=r"model\.quantization: 'int4' needs a GPU; on CPU use one of none, fp16, int8"
    ):
        build("cpu", "int4")
