"""`expertmesh warmup`: compile and tune the GPU kernels once, so that no group does it while it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import click
import torch
import typer

from cluster.config.load import load_mesh
from cluster.config.mesh import MeshConfig
from cluster.model_files import open_checkpoint, pick_device, pick_dtype
from experts.ops.cache_directory import cache_directory
from experts.spec import ExpertKey
from experts.weights.layout import describe_experts
from experts.weights.loader import load_experts


def command(mesh: Annotated[Path, typer.Argument(help="mesh.yaml")]) -> None:
    """Compile and tune the kernels for the experts of mesh.yaml's model on this machine's GPU; run it once per kind
    of card. Choices go into $EXPERTMESH_CACHE_DIR (else ~/.cache/expertmesh), compiled kernels into Triton's cache."""
    config = load_mesh(mesh)
    device = pick_device(config.experts.device)
    if device.type == "cpu":
        click.echo("This machine computes experts on its CPU: nothing to compile or tune.")
        return
    warm_up(config, device, click.echo)
    click.echo(f"kept in {cache_directory()}")


def warm_up(config: MeshConfig, device: torch.device, report: Callable[[str], None]) -> None:
    """Tune with as many experts of the model's first MoE layer as one group holds, then compile what was chosen.

    report: gets a line for each choice. Raises CheckpointError, ConfigError.
    """
    # Triton is imported only where there is a card for it.
    from experts.ops.triton_backend import TritonBackend
    from experts.ops.tune_backend import tune_backend

    checkpoint = open_checkpoint(config.model)
    model_config = checkpoint.config()
    layout = describe_experts(checkpoint, model_config)
    layer, num_experts = next(iter(sorted(layout.experts_per_layer.items())))
    slots = range(-(-num_experts // config.experts.groups))
    dtype = pick_dtype(config.model.dtype, model_config, device)
    backend = TritonBackend(layout.spec, device=device, dtype=dtype, quantization=config.model.quantization)
    loaded = load_experts(checkpoint, layout, [ExpertKey(layer, expert) for expert in slots])
    for slot, expert in zip(slots, loaded, strict=True):
        backend.load(slot, expert.weights)
    for step in tune_backend(backend, slots, dtype=dtype):
        tiles = step.config
        report(
            f"{step.projection:<4} up to {step.rows:3} rows an expert: {step.ms:7.3f} ms with {tiles.kernel} tiles "
            f"{tiles.rows} x {tiles.columns} x {tiles.depth}, {tiles.warps} warps, {tiles.stages} stages"
        )
    if device.type == "cuda":
        backend.warm(0)
