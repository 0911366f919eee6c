"""Where a model's files are, and what they are computed with: the same answer in every process of an application."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.config.mesh import MeshConfig, ModelConfig
from cluster.gate_options import check_gate_options
from cluster.serving import checkpoint_source
from experts.errors import ConfigError
from experts.ops.backend import ExpertBackend, build_backend
from experts.spec import ExpertSpec
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import ExpertLayout, describe_experts
from router_service.placement import balanced

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_checkpoint(model: ModelConfig) -> Checkpoint:
    """The checkpoint that `model.source` names; a hub id's files are fetched as they are needed.

    Raises CheckpointError.
    """
    return checkpoint_source.open_checkpoint(model.source, revision=model.revision)


def served_name(model: ModelConfig) -> str:
    """What clients call the model: `served_name`, else a directory's name, else the hub id."""
    return model.served_name or (Path(model.source).name if Path(model.source).is_dir() else model.source)


def check_model(config: MeshConfig) -> ExpertLayout:
    """Read the headers and see that the experts can be gated and spread as asked, before anything is started.

    Raises CheckpointError, ConfigError.
    """
    checkpoint = open_checkpoint(config.model)
    model_config = checkpoint.config()
    check_gate_options(config.router, model_config)
    layout = describe_experts(checkpoint, model_config)
    balanced(
        layout.experts_per_layer,
        config.experts.groups,
        nodes_of_groups=None,
        num_redundant_experts=config.experts.num_redundant_experts,
    )
    return layout


def expert_backend(
    config: MeshConfig, spec: ExpertSpec, model_config: Mapping[str, Any], device: torch.device, *, num_threads: int
) -> ExpertBackend:
    """What computes a group's experts. num_threads: cores of this machine that one call may use."""
    return build_backend(
        spec,
        device=device,
        dtype=pick_dtype(config.model.dtype, model_config, device),
        quantization=config.model.quantization,
        num_threads=num_threads,
    )


def pick_device(device: str) -> torch.device:
    """`auto`: the GPU that Ray gave this process, else the CPU. Raises ConfigError where cuda is absent."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda is asked for, but this process sees no GPU; use auto or cpu, or num_gpus: 1")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def pick_dtype(dtype: str, model_config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """`auto`: the checkpoint's own dtype on a GPU; float32 on a CPU, where it costs no accuracy and most CPUs have
    no fast bfloat16."""
    if dtype != "auto":
        return _DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    named = str(model_config.get("dtype") or model_config.get("torch_dtype") or "bfloat16")
    return _DTYPES.get(named.removeprefix("torch."), torch.bfloat16)


def engine_dtype(dtype: str, model_config: Mapping[str, Any], device: torch.device) -> torch.dtype:
    """What an engine on `device` computes in. Raises ConfigError where a CPU is asked for anything but float32."""
    picked = pick_dtype(dtype, model_config, device)
    if picked is not torch.float32 and device.type == "cpu":
        raise ConfigError(f"model.dtype: {dtype} is for GPUs; use auto or float32 on a CPU")
    return picked
