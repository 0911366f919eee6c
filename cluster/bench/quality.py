"""`expertmesh bench quality`: what each quantisation of the experts costs in bits per byte of held-out text.

The model runs as it is served, skeleton and router in one process, in float32 but for the experts: gates are float32
and shared experts, attention and embeddings are at the checkpoint's precision in every row. CPU rows come from the
CPU's own backend, GPU rows from an emulation of what the kernels compute.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from cluster.bench.emulated_backend import EmulatedBackend
from cluster.bench.held_out import held_out_texts
from cluster.serving.attention_batch import AttentionBatch, Chunk
from cluster.serving.kv_cache import KVCache
from cluster.serving.skeleton import ModelSkeleton, load_skeleton
from cluster.serving.tokenizer import Tokenizer, load_tokenizer
from experts.group import ExpertGroup
from experts.ops.backend import ExpertBackend
from experts.ops.cpu_backend import FORMATS, CpuBackend
from experts.ops.cpu_float16 import Float16Linear
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

_CPU = torch.device("cpu")
_MOST_CONTEXT = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Excerpt:
    """The beginning of a text. num_bytes: UTF-8 bytes of all tokens but the first, which nothing predicts."""

    ids_T: torch.Tensor
    num_bytes: int


def run(
    *, model: Path = DEMO_MODEL, tokens: int = 16384, threads: int = 2, console: Console | None = None
) -> dict[str, Any]:
    """Score every scheme on the same text.

    tokens:  how much text; the beginnings of as many held-out files as that takes, a context each
    console: where progress goes

    rows: device (`cpu`: its own backend; `gpu`: emulated, in bfloat16), scheme (as `model.quantization` in mesh.yaml),
    bits_per_byte, shift (of that, against experts in float32), shift_error (its standard error over the texts; None
    for one text), relative_error (norm of the difference of all logits to those with experts in float32, over the
    latter's norm).
    summary: model, tokens, bytes, bits_per_byte of experts in float32.

    Raises CheckpointError for a model that cannot be served.
    """
    torch.set_num_threads(threads)
    console = console or Console(quiet=True)
    checkpoint = Checkpoint(model)
    skeleton = load_skeleton(checkpoint, dtype=torch.float32, device=_CPU)
    layout = describe_experts(checkpoint, checkpoint.config())
    context = min(_MOST_CONTEXT, skeleton.max_position_embeddings)
    excerpts = excerpts_of(load_tokenizer(model), tokens=tokens, context=context)

    def score(backend: ExpertBackend, name: str) -> Iterator[torch.Tensor]:
        skeleton.connect(_router(checkpoint, layout, skeleton.gates, backend))
        for index, excerpt in enumerate(excerpts):
            console.print(f"{name}: text {index + 1} of {len(excerpts)}", highlight=False)
            yield logits_of(skeleton, excerpt.ids_T[:-1])

    plain = EmulatedBackend(layout.spec, Unquantised(torch.float32), dtype=torch.float32)
    expected = list(score(plain, "float32"))
    num_bytes = sum(excerpt.num_bytes for excerpt in excerpts)
    norm = math.sqrt(sum(float(logits.square().sum()) for logits in expected))
    expected_bits = list(map(_bits, expected, excerpts))
    rows: list[dict[str, Any]] = []
    for (device, scheme), backend in backends(layout.spec, threads).items():
        shifts: list[float] = []
        difference = 0.0
        for index, logits in enumerate(score(backend, f"{device} {scheme}")):
            shifts.append(_bits(logits, excerpts[index]) - expected_bits[index])
            difference += float((logits - expected[index]).square().sum())
        rows.append(
            {
                "device": device,
                "scheme": scheme,
                "bits_per_byte": (sum(expected_bits) + sum(shifts)) / num_bytes,
                "shift": sum(shifts) / num_bytes,
                "shift_error": _error_of_sum(shifts, num_bytes),
                "relative_error": math.sqrt(difference) / norm,
            }
        )
    num_tokens = sum(len(excerpt.ids_T) - 1 for excerpt in excerpts)
    summary = {
        "model": str(model),
        "tokens": num_tokens,
        "bytes": num_bytes,
        "bits_per_byte": sum(expected_bits) / num_bytes,
    }
    return {"rows": rows, "summary": summary}


def backends(spec: ExpertSpec, threads: int) -> Mapping[tuple[str, str], ExpertBackend]:
    """(device, scheme) -> empty backend; without those that this CPU does not have."""
    cpu = [scheme for scheme in FORMATS if scheme != "fp16" or Float16Linear.is_supported()]
    made: dict[tuple[str, str], ExpertBackend] = {}
    for scheme in cpu:
        made["cpu", scheme] = CpuBackend(spec, quantization=scheme, num_threads=threads)
    for scheme in GPU_SCHEMES:
        made["gpu", scheme] = EmulatedBackend(spec, build_scheme(scheme, GPU_DTYPE), dtype=GPU_DTYPE)
    return made


def excerpts_of(tokenizer: Tokenizer, *, tokens: int, context: int) -> list[Excerpt]:
    """Beginnings of held-out files, `context` tokens of each at most, `tokens` in all at most."""
    excerpts: list[Excerpt] = []
    for text in held_out_texts():
        ids = tokenizer.encode(text, add_special_tokens=True)[: min(tokens, context) + 1]
        if len(ids) > 1:
            num_bytes = sum(len(tokenizer.token_bytes(token_id)) for token_id in ids[1:])
            excerpts.append(Excerpt(ids_T=torch.tensor(ids), num_bytes=num_bytes))
            tokens -= len(ids) - 1
        if tokens <= 0:
            break
    return excerpts


@torch.inference_mode()
def logits_of(skeleton: ModelSkeleton, ids_T: torch.Tensor) -> torch.Tensor:
    """float32 [T, vocabulary], all of a text in one step."""
    num_tokens = len(ids_T)
    memory = num_tokens * skeleton.kv_layout.bytes_per_token
    cache = KVCache(skeleton.kv_layout, memory=memory, max_num_seqs=1, max_model_len=num_tokens)
    slot = cache.allocate(num_tokens)
    assert slot is not None
    batch = AttentionBatch([Chunk(slot=slot, num_tokens=num_tokens)], skeleton.device)
    positions_T = torch.arange(num_tokens)
    return skeleton.forward(ids_T, positions_T, batch, positions_T)


def _bits(logits_TV: torch.Tensor, excerpt: Excerpt) -> float:
    return float(F.cross_entropy(logits_TV, excerpt.ids_T[1:], reduction="sum")) / math.log(2)


def _error_of_sum(values: Sequence[float], unit: float) -> float | None:
    """Standard error of `sum(values) / unit`, values being independent."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) * math.sqrt(len(values)) / unit


def _router(checkpoint: Checkpoint, layout: ExpertLayout, gates: Mapping[int, Gate], backend: ExpertBackend) -> Router:
    group = ExpertGroup(0, layout.spec, backend)
    counts = layout.experts_per_layer
    group.assign(layout, checkpoint, [ExpertKey(layer, e) for layer, count in counts.items() for e in range(count)])
    router = Router(InProcessTransport({"all": group}), gates, recovery_timeout_s=0)
    replica = GroupReplica(group=0, replica="all", node="here", address="")
    holders = balanced(counts, 1, nodes_of_groups=None)
    router.update(PlacementTable(version=1, num_groups=1, holders=holders, replicas=(replica,)))
    return router


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    model: Annotated[Path, typer.Option(help="Checkpoint directory.")] = DEMO_MODEL,
    tokens: Annotated[int, typer.Option(min=1, help="How much held-out text.")] = 16384,
    threads: Annotated[int, typer.Option(min=1, help="Cores to use.")] = 2,
) -> None:
    """Held-out bits per byte and the logits' error in each quantisation of the experts."""
    result = run(model=model, tokens=tokens, threads=threads, console=Console(stderr=True))
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    table = Table("device", "scheme", "bits per byte", "shift", "relative error of logits")
    for row in result["rows"]:
        table.add_row(
            row["device"],
            row["scheme"],
            f"{row['bits_per_byte']:.4f}",
            f"{row['shift']:+.5f}" + (f" ± {row['shift_error']:.5f}" if row["shift_error"] is not None else ""),
            f"{row['relative_error']:.1e}",
        )
    output = Console()
    output.print(table)
    for name, value in result["summary"].items():
        output.print(f"{name}: {value}")
