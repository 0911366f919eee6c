"""`expertmesh bench quality`: what lossy options cost in bits per byte of held-out text.

Those are each quantisation of the experts, and a node limit in mode `restrict`. The model runs as it is served,
skeleton and router in one process, in float32 but for the experts: gates are float32 and shared experts, attention and
embeddings are at the checkpoint's precision in every row. CPU rows come from the CPU's own backend, GPU rows from an
emulation of what the kernels compute; the node limits' experts are in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from cluster.bench.emulated_backend import EmulatedBackend
from cluster.bench.held_out_score import HeldOutScore, excerpts_of
from cluster.serving.skeleton import load_skeleton
from cluster.serving.tokenizer import load_tokenizer
from experts.group import ExpertGroup
from experts.ops.backend import ExpertBackend
from experts.ops.cpu_backend import CpuBackend
from experts.ops.cpu_format import FORMATS, has_fp16
from experts.quant.schemes import build_scheme
from experts.quant.unquantised import Unquantised
from experts.spec import ExpertKey, ExpertSpec
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import ExpertLayout, describe_experts
from router_service.gating.gate import Gate
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.transport.in_process import InProcessTransport

DEMO_MODEL = Path("deploy/demo-model")
GPU_DTYPE = torch.bfloat16
GPU_SCHEMES = ("none", "fp8_block", "fp8", "int8", "int4")
NODES = (4, 8)
NODE_LIMITS = (None, 3, 2, 1)

_CPU = torch.device("cpu")
_MOST_CONTEXT = 1024


def run(
    *, model: Path = DEMO_MODEL, tokens: int = 16384, threads: int = 2, console: Console | None = None
) -> dict[str, Any]:
    """Score every scheme and node limit on the same text.

    tokens:  how much text; the beginnings of as many held-out files as that takes, a context each
    console: where progress goes

    rows: device (`cpu`: its own backend; `gpu`: emulated, in bfloat16), scheme (as `model.quantization` in mesh.yaml),
    and what `HeldOutScore.compare` gives, against experts in float32.
    node_limits: nodes (an equal share of each layer's experts on each), max_nodes_per_token (None: no limit; else with
    `node_limit_mode: restrict`), nodes_per_token (mean over tokens and layers), and the same figures. None of a model
    whose gates are transformers' own: they choose before the router does.
    summary: model, tokens, bytes, bits_per_byte of experts in float32.

    Raises CheckpointError for a model that cannot be served.
    """
    torch.set_num_threads(threads)
    checkpoint = Checkpoint(model)
    skeleton = load_skeleton(checkpoint, dtype=torch.float32, device=_CPU)
    layout = describe_experts(checkpoint, checkpoint.config())
    context = min(_MOST_CONTEXT, skeleton.max_position_embeddings)
    excerpts = excerpts_of(load_tokenizer(model), tokens=tokens, context=context)
    plain = _group(checkpoint, layout, EmulatedBackend(layout.spec, Unquantised(torch.float32), dtype=torch.float32))
    score = HeldOutScore(skeleton, excerpts, _router(layout, skeleton.gates, plain), console or Console(quiet=True))
    rows: list[dict[str, Any]] = []
    for (device, scheme), backend in backends(layout.spec, threads).items():
        router = _router(layout, skeleton.gates, _group(checkpoint, layout, backend))
        rows.append({"device": device, "scheme": scheme, **score.compare(router, f"{device} {scheme}")})
    limits: list[dict[str, Any]] = []
    for nodes, limit in node_limits(layout, skeleton.gates):
        router = _router(layout, skeleton.gates, plain, nodes, limit)
        figures = score.compare(router, f"{nodes} nodes, {limit or 'all'} for a token")
        nodes_per_token = router.counters.token_nodes / router.counters.tokens
        limits.append(
            {"nodes": nodes, "max_nodes_per_token": limit, "nodes_per_token": round(nodes_per_token, 3), **figures}
        )
    summary = {
        "model": str(model),
        "tokens": score.num_tokens,
        "bytes": score.num_bytes,
        "bits_per_byte": score.bits_per_byte,
    }
    return {"rows": rows, "node_limits": limits, "summary": summary}


def backends(spec: ExpertSpec, threads: int) -> Mapping[tuple[str, str], ExpertBackend]:
    """(device, scheme) -> empty backend; without those that this CPU does not have."""
    cpu = [scheme for scheme in FORMATS if scheme != "fp16" or has_fp16()]
    made: dict[tuple[str, str], ExpertBackend] = {}
    for scheme in cpu:
        made["cpu", scheme] = CpuBackend(spec, quantization=scheme, num_threads=threads)
    for scheme in GPU_SCHEMES:
        made["gpu", scheme] = EmulatedBackend(spec, build_scheme(scheme, GPU_DTYPE), dtype=GPU_DTYPE)
    return made


def node_limits(layout: ExpertLayout, gates: Mapping[int, Gate]) -> list[tuple[int, int | None]]:
    """(nodes, limit) to try: those that leave a token as many experts as it uses."""
    if not gates:
        return []
    gate = next(iter(gates.values()))
    top_k = gate(torch.zeros(1, layout.spec.hidden_size)).expert_ids_TK.shape[1]
    num_experts = min(layout.experts_per_layer.values())
    return [
        (nodes, limit)
        for nodes in NODES
        for limit in NODE_LIMITS
        if nodes <= num_experts and (limit or nodes) * (num_experts // nodes) >= top_k
    ]


def _group(checkpoint: Checkpoint, layout: ExpertLayout, backend: ExpertBackend) -> ExpertGroup:
    group = ExpertGroup(0, layout.spec, backend)
    counts = layout.experts_per_layer
    group.assign(layout, checkpoint, [ExpertKey(layer, e) for layer, count in counts.items() for e in range(count)])
    return group


def _router(
    layout: ExpertLayout, gates: Mapping[int, Gate], group: ExpertGroup, nodes: int = 1, limit: int | None = None
) -> Router:
    """A router that takes `group`, which holds all experts, for `nodes` nodes with a share of them each."""
    names = [f"node-{node}" for node in range(nodes)]
    router = Router(
        InProcessTransport(dict.fromkeys(names, group)),
        gates,
        recovery_timeout_s=0,
        max_nodes_per_token=limit,
        node_limit_mode="restrict",
    )
    holders = balanced(layout.experts_per_layer, nodes, nodes_of_groups=names)
    replicas = tuple(GroupReplica(group=node, replica=name, node=name, address="") for node, name in enumerate(names))
    router.update(PlacementTable(version=1, num_groups=nodes, holders=holders, replicas=replicas))
    return router


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = DEMO_MODEL,
    tokens: Annotated[int, typer.Option(min=1, help="How much held-out text.")] = 16384,
    threads: Annotated[int, typer.Option(min=1, help="Cores to use.")] = 2,
) -> None:
    """Held-out bits per byte and the logits' error in each quantisation of the experts and node limit."""
    result = run(model=model, tokens=tokens, threads=threads, console=Console(stderr=True))
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    figures = ("bits per byte", "shift", "relative error of logits")
    schemes = Table("device", "scheme", *figures)
    for row in result["rows"]:
        schemes.add_row(row["device"], row["scheme"], *_figures(row))
    limits = Table("nodes", "max_nodes_per_token", "nodes per token", *figures)
    for row in result["node_limits"]:
        limit = str(row["max_nodes_per_token"] or "no limit")
        limits.add_row(str(row["nodes"]), limit, f"{row['nodes_per_token']:.2f}", *_figures(row))
    output = Console()
    output.print(schemes, limits)
    for name, value in result["summary"].items():
        output.print(f"{name}: {value}")


def _figures(row: Mapping[str, Any]) -> tuple[str, str, str]:
    error = f" ± {row['shift_error']:.5f}" if row["shift_error"] is not None else ""
    return f"{row['bits_per_byte']:.4f}", f"{row['shift']:+.5f}{error}", f"{row['relative_error']:.1e}"
