"""`expertmesh plan`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.planner.deployment import deployment_numbers
from cluster.planner.hardware import find_gpu, find_interconnect, gpu_presets, interconnect_presets
from cluster.planner.kustomize import kustomize_patch
from cluster.planner.models import find_model, model_presets
from cluster.planner.plan import Plan, PlanRequest, make_plan
from cluster.planner.precision import QUANTIZATIONS
from cluster.planner.refusal import refusal
from cluster.planner.report import print_report
from cluster.planner.summary import summarize
from experts.errors import ConfigError

_MOST_NODES = 64
_CONTEXT = 4096
_WIRE_DTYPES = ("model", "bf16", "fp8")


def command(
    model: Annotated[str, typer.Argument(help=f"config.json, a directory with one, or: {', '.join(model_presets())}")],
    gpu: Annotated[str, typer.Option(help=f"{', '.join(gpu_presets())}, or a YAML of your own")] = "h100-80g",
    nodes: Annotated[int | None, typer.Option(help="Nodes; the fewest that fit where not given")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="The card's usual number where not given")] = None,
    quantization: Annotated[str, typer.Option(help=f"Of the experts: {', '.join(QUANTIZATIONS)}")] = "none",
    context: Annotated[
        int | None, typer.Option(help="Tokens of a sequence, prompt and answer; 4096, or all the model has")
    ] = None,
    load: Annotated[float | None, typer.Option(help="Output tokens/s to sustain")] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most sequences that an engine decodes at once")] = 256,
    interconnect: Annotated[
        str | None, typer.Option(help=f"Between nodes: {', '.join(interconnect_presets())}")
    ] = None,
    wire_dtype: Annotated[str, typer.Option(help=f"Of dispatched rows: {', '.join(_WIRE_DTYPES)}")] = "model",
    price_per_gpu_hour: Annotated[float | None, typer.Option(help="For the cost of a million tokens")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw nodes, GPUs and groups: a .svg or .png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every figure, as JSON")] = False,
    as_kustomize: Annotated[bool, typer.Option("--kustomize", help="The patch of an overlay under deploy/")] = False,
) -> None:
    """What a model needs, before a GPU is booked: memory, slots, traffic, speed, cost, and what cannot work.

    Exit codes: 0 it fits, 2 it cannot work (with the smallest thing that would).
    """
    if wire_dtype not in _WIRE_DTYPES:
        raise ConfigError(f"--wire-dtype {wire_dtype}: use one of {', '.join(_WIRE_DTYPES)}")
    if price_per_gpu_hour is not None and not price_per_gpu_hour > 0:
        raise ConfigError(f"--price-per-gpu-hour {price_per_gpu_hour}: a positive price is needed")
    if as_json and as_kustomize:
        raise ConfigError("--json and --kustomize: choose one")
    card, found = find_gpu(gpu), find_model(model)
    positions = found.architecture.max_position_embeddings or _CONTEXT
    request = PlanRequest(
        model=found,
        gpu=card,
        interconnect=find_interconnect(interconnect or card.interconnect),
        nodes=1 if nodes is None else nodes,
        gpus_per_node=card.gpus_per_node if gpus_per_node is None else gpus_per_node,
        quantization=quantization,
        context=min(_CONTEXT, positions) if context is None else context,
        load=load,
        max_num_seqs=max_num_seqs,
        wire_dtype=wire_dtype,
    )
    plan = make_plan(request) if nodes is not None else _fewest_nodes(request)
    if as_json:
        typer.echo(json.dumps(summarize(plan, price_per_gpu_hour), indent=2))
    if not plan.fits:
        raise ConfigError(refusal(plan))
    if picture is not None:
        from cluster.planner.picture import draw  # matplotlib takes longer to import than a plan to make

        draw(plan, picture)
    if as_kustomize:
        patch = kustomize_patch(deployment_numbers(plan), model_source=_source(plan), header=_header(plan))
        typer.echo(patch, nl=False)
    elif not as_json:
        print_report(plan, price_per_gpu_hour, Console())


def _fewest_nodes(request: PlanRequest) -> Plan:
    plan = smallest = make_plan(request)
    for nodes in range(2, _MOST_NODES + 1):
        if plan.fits:
            return plan
        plan = make_plan(replace(request, nodes=nodes))
    return plan if plan.fits else smallest


def _source(plan: Plan) -> str:
    """What mesh.yaml's `model.source` would be: the hub id of a preset, or the directory that was given."""
    source = plan.request.model.source
    if source.startswith("https://huggingface.co/"):
        return "/".join(source.removeprefix("https://huggingface.co/").split("/")[:2])
    return str(Path(source).parent) if source.endswith("config.json") else source


def _header(plan: Plan) -> str:
    request = plan.request
    flags = f"--gpu {request.gpu.name} --nodes {request.nodes} --gpus-per-node {request.gpus_per_node}"
    flags += f" --context {request.context} --max-num-seqs {request.max_num_seqs}"
    if request.quantization != "none":
        flags += f" --quantization {request.quantization}"
    if request.load is not None:
        flags += f" --load {request.load:g}"
    return f"Written by: expertmesh plan {request.model.name} {flags} --kustomize"
