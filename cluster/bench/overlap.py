"""`expertmesh bench overlap`: an engine's step as one batch beside the same step as two micro-batches.

Both take turns, step by step, in one process over the same connections; expert groups are other processes, reached
over gRPC. Their experts are either real and share this machine's cores with the engine (`here`: what overlap costs
where waiting is computing), or stand-ins that answer as late as a device elsewhere would and take no CPU time
(`elsewhere`: what it hides). Outputs of both sides are compared in every row.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from cluster.bench.checkpoints import MAX_MODEL_LEN, preset_checkpoint
from cluster.bench.processes import announcing_processes
from cluster.serving.attention_batch import Chunk
from cluster.serving.kv_cache import KVCache
from cluster.serving.micro_batch import Step
from cluster.serving.model_runner import ModelRunner, OverlapThresholds, StepOutput
from cluster.serving.request import SamplingParams
from cluster.serving.sequence import RunningSequence
from cluster.serving.skeleton import ModelSkeleton, load_skeleton
from experts.errors import ConfigError
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.transport.grpc_stream import GrpcTransport

_PROMPT_TOKENS = 128
_ALWAYS = OverlapThresholds(decode_tokens=2, prefill_tokens=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapBench:
    """What to run.

    decode, prefill: tokens of the steps; those that decode have 128 tokens each behind them, prompts are 128 long
    experts:    here, elsewhere
    latency_ms, us_per_row: of a group elsewhere: the way there and back, and the work on a routed row
    seconds:    time for each row
    """

    checkpoint: str = "mixtral"
    decode: tuple[int, ...] = (2, 8, 32, 128)
    prefill: tuple[int, ...] = (128, 512, 2048)
    experts: tuple[str, ...] = ("here", "elsewhere")
    groups: int = 2
    latency_ms: float = 1.0
    us_per_row: float = 10.0
    seconds: float = 6.0

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ConfigError(f"--groups is {self.groups}: give 1 or more")
        if min((*self.decode, *self.prefill), default=2) < 2:
            raise ConfigError("--decode and --prefill take numbers of tokens from 2: a step of one has no halves")
        if unknown := set(self.experts) - {"here", "elsewhere"}:
            raise ConfigError(f"--experts {', '.join(sorted(unknown))} is not one of here, elsewhere")
        if self.latency_ms < 0 or self.us_per_row < 0:
            raise ConfigError("--latency-ms and --us-per-row cannot be negative")


def run(bench: OverlapBench, *, console: Console | None = None) -> dict[str, Any]:
    """{"machine", "rows", "summary"}.

    rows: `off_ms`, `on_ms` (medians of a step as one batch and as two), `speedup` (off by on), `waiting_off`,
    `waiting_on` (share of the step in which nothing was computed but experts), `logits_differ` (largest absolute
    difference), `same_tokens` (greedy).
    summary: experts -> step -> fewest measured tokens from which on two were faster in every row; null: in none.
    """
    console = console or Console(stderr=True)
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"[yellow]This machine is not idle (load {load:.1f}): the figures will mislead.")
    directory = Path(bench.checkpoint)
    if not directory.is_dir():
        directory = preset_checkpoint(bench.checkpoint)
    # As EngineHost does.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    rows: list[dict[str, Any]] = []
    try:
        for experts in bench.experts:
            # As in an engine, steps run in another thread than the one that loaded the model: OpenMP keeps a team for
            # each, which changes how its threads wait.
            with _connected_skeleton(bench, directory, experts) as skeleton, ThreadPoolExecutor(1, "engine") as engine:
                for kind, sizes in (("decode", bench.decode), ("prefill", bench.prefill)):
                    for num_tokens in sizes:
                        row = {"experts": experts, "step": kind, "tokens": num_tokens}
                        rows.append(row | engine.submit(_measure, skeleton, kind, num_tokens, bench.seconds).result())
                        console.print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    finally:
        sys.setswitchinterval(interval)
    machine = {"cores": len(os.sched_getaffinity(0)), "load_at_start": round(load, 2), "torch": torch.__version__}
    return {"machine": machine, "rows": rows, "summary": summarise(rows)}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int | None]]:
    """`run`'s summary of its rows."""
    summary: dict[str, dict[str, int | None]] = {}
    for experts, step in dict.fromkeys((row["experts"], row["step"]) for row in rows):
        alike = [row for row in rows if (row["experts"], row["step"]) == (experts, step)]
        lost = max((row["tokens"] for row in alike if row["speedup"] <= 1), default=0)
        pays_from = min((row["tokens"] for row in alike if row["tokens"] > lost), default=None)
        summary.setdefault(experts, {})[step] = pays_from
    return summary


@torch.inference_mode()
def _measure(skeleton: ModelSkeleton, kind: str, num_tokens: int, seconds: float) -> dict[str, Any]:
    step = _step(skeleton, kind, num_tokens)
    runners = ModelRunner(skeleton, None), ModelRunner(skeleton, _ALWAYS)
    # The first of each side warms up; a step only writes what it wrote before, so that it can be repeated.
    outputs = [runner.run(step) for runner in runners]
    logits = [_logits_by_sequence(output) for output in outputs]
    taken: tuple[list[float], list[float]] = ([], [])
    waited: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < 5:
        for runner, times, waits in zip(runners, taken, waited, strict=True):
            waited_before, started = skeleton.connection.wait_s, time.perf_counter()
            runner.run(step)
            times.append(time.perf_counter() - started)
            waits.append(skeleton.connection.wait_s - waited_before)
    off_s, on_s = (statistics.median(times) for times in taken)
    return {
        "off_ms": round(off_s * 1e3, 2),
        "on_ms": round(on_s * 1e3, 2),
        "speedup": round(off_s / on_s, 3),
        "waiting_off": round(statistics.median(waited[0]) / off_s, 3),
        "waiting_on": round(statistics.median(waited[1]) / on_s, 3),
        "logits_differ": float((logits[0] - logits[1]).abs().max()),
        "same_tokens": bool((logits[0].argmax(-1) == logits[1].argmax(-1)).all()),
    }


def _step(skeleton: ModelSkeleton, kind: str, num_tokens: int) -> Step:
    """`num_tokens` sequences with a prompt behind them, or prompts of as many tokens together."""
    if kind == "decode":
        lengths = [_PROMPT_TOKENS + 1] * num_tokens
    else:
        lengths = [_PROMPT_TOKENS] * (num_tokens // _PROMPT_TOKENS)
        lengths += [num_tokens % _PROMPT_TOKENS] * (num_tokens % _PROMPT_TOKENS > 0)
    cache = KVCache(
        skeleton.kv_layout,
        memory=MAX_MODEL_LEN * len(lengths) * skeleton.kv_layout.bytes_per_token,
        max_num_seqs=len(lengths),
        max_model_len=MAX_MODEL_LEN,
    )
    generator = torch.Generator().manual_seed(num_tokens)
    step: list[tuple[RunningSequence, Chunk]] = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(2, skeleton.vocab_size, (length,), generator=generator).tolist()
        sequence = RunningSequence(
            index,
            tokens,
            SamplingParams(max_tokens=1),
            lambda _: None,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=frozenset(),
        )
        slot = cache.allocate(length + 1)
        assert slot is not None, "the cache was made for all of them"
        step.append((sequence, Chunk(slot=slot, num_tokens=length)))
    if kind == "prefill":
        return step
    behind = [(sequence, Chunk(slot=chunk.slot, num_tokens=_PROMPT_TOKENS)) for sequence, chunk in step]
    ModelRunner(skeleton, None).run(behind)
    for _, chunk in step:
        chunk.slot.length = _PROMPT_TOKENS
    return [(sequence, Chunk(slot=chunk.slot, num_tokens=1)) for sequence, chunk in step]


def _logits_by_sequence(output: StepOutput) -> torch.Tensor:
    order = sorted(range(len(output.sampled)), key=lambda row: output.sampled[row].id)
    return output.logits[order]


@contextmanager
def _connected_skeleton(bench: OverlapBench, directory: Path, experts: str) -> Iterator[ModelSkeleton]:
    checkpoint = Checkpoint(directory)
    skeleton = load_skeleton(checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    layout = describe_experts(checkpoint, checkpoint.config())
    pace = (str(bench.latency_ms), str(bench.us_per_row)) if experts == "elsewhere" else ()
    with _peers(directory, bench.groups, pace) as addresses:
        replicas = tuple(
            GroupReplica(group=group, replica=f"group-{group}", node="bench", address=address)
            for group, address in enumerate(addresses)
        )
        router = Router(GrpcTransport(), skeleton.gates, recovery_timeout_s=30.0)
        holders = balanced(layout.experts_per_layer, bench.groups)
        router.update(PlacementTable(version=1, num_groups=bench.groups, holders=holders, replicas=replicas))
        skeleton.connect(router)
        try:
            yield skeleton
        finally:
            router.close()


@contextmanager
def _peers(directory: Path, count: int, pace: Sequence[str]) -> Iterator[list[str]]:
    """Addresses of the groups."""

    def command(group: int, file: Path) -> Sequence[str]:
        numbers = (str(group), str(count))
        return (sys.executable, "-m", "cluster.bench.overlap_peer", str(directory), *numbers, str(file), *pace)

    with announcing_processes([partial(command, group) for group in range(count)]) as addresses:
        yield addresses


def command(
    checkpoint: Annotated[str, typer.Option(help="Preset (mixtral, deepseek-v3) or directory.")] = "mixtral",
    decode: Annotated[list[int] | None, typer.Option(help="Sequences that decode in a step; repeatable.")] = None,
    prefill: Annotated[list[int] | None, typer.Option(help="Tokens of prompts in a step; repeatable.")] = None,
    experts: Annotated[list[str] | None, typer.Option(help="here or elsewhere; repeatable.")] = None,
    groups: Annotated[int, typer.Option(help="Expert groups, a process each.")] = 2,
    latency_ms: Annotated[float, typer.Option(help="To a group elsewhere and back.")] = 1.0,
    us_per_row: Annotated[float, typer.Option(help="What a group elsewhere takes for a routed row.")] = 10.0,
    seconds: Annotated[float, typer.Option(help="Time for each row.")] = 6.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """A step as one batch beside the same step as two micro-batches."""
    defaults = OverlapBench()
    result = run(
        OverlapBench(
            checkpoint=checkpoint,
            decode=tuple(decode or defaults.decode),
            prefill=tuple(prefill or defaults.prefill),
            experts=tuple(experts or defaults.experts),
            groups=groups,
            latency_ms=latency_ms,
            us_per_row=us_per_row,
            seconds=seconds,
        )
    )
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = Table("experts", "step", "tokens", "one batch ms", "two ms", "speedup", "waiting", "same tokens")
    for row in result["rows"]:
        waiting = f"{row['waiting_off']:.0%} → {row['waiting_on']:.0%}"
        figures = (str(row["tokens"]), str(row["off_ms"]), str(row["on_ms"]), str(row["speedup"]))
        table.add_row(row["experts"], row["step"], *figures, waiting, str(row["same_tokens"]))
    Console().print(table)
