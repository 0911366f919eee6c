"""`expertmesh bench serve`: this server and its peers on the same checkpoint, prompts and concurrency.

Servers run one after the other, each on the whole machine, in turns (`--rounds`); every figure is the median
over the rounds. All HTTP servers are timed by one load generator (cluster/bench/load.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from cluster.bench.checkpoints import PRESETS, preset_checkpoint
from cluster.bench.load import Measurement, RequestTiming, build_prompts, send_load, summarise
from cluster.bench.processes import child_process, interruptible, log_tail
from cluster.bench.servers import OURS, check_name, expertmesh_server, vllm_server
from cluster.bench.step_times import shares_of, step_seconds
from experts.errors import ConfigError, MeshError

DEFAULT_SERVERS = (
    "expertmesh-grpc",
    "expertmesh-in_process",
    "vllm",
    "transformers-generate",
    "transformers-continuous",
)
VLLM_PYTHON_VARIABLE = "EXPERTMESH_BENCH_VLLM_PYTHON"
TRANSFORMERS_TIMEOUT_S = 1200
FIGURES = ("output_tokens_per_s", "ttft_ms_p50", "itl_ms_p50", "itl_ms_p99", "e2e_ms_p50")


@dataclass(frozen=True, kw_only=True, slots=True)
class Wave:
    """time_shares: of our servers, what the wall time went to: parts of the engine's steps, and what is between them"""

    figures: Measurement
    time_shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeBench:
    """What to run.

    checkpoints: presets' names or checkpoint directories
    url:         base URL of a server of ours that already runs `checkpoints[0]`; none is started then
    streams:     concurrencies to measure
    groups:      expert groups (actors) of the servers that we start
    """

    checkpoints: tuple[str, ...] = tuple(PRESETS)
    servers: tuple[str, ...] = DEFAULT_SERVERS
    streams: tuple[int, ...] = (1, 16)
    rounds: int = 3
    prompt_tokens: int = 128
    output_tokens: int = 64
    groups: int = 2
    dtype: str = "float32"
    url: str | None = None
    vllm_python: Path | None = None

    def __post_init__(self) -> None:
        for name in self.servers:
            check_name(name)
        for key in ("rounds", "prompt_tokens", "output_tokens", "groups"):
            if getattr(self, key) < 1:
                raise ConfigError(f"--{key.replace('_', '-')} is {getattr(self, key)}: give 1 or more")
        if not self.streams or min(self.streams) < 1:
            raise ConfigError(f"--streams is {self.streams}: give 1 or more")
        if self.url is not None and len(self.checkpoints) != 1:
            raise ConfigError("--url names one running server: name its checkpoint with one --checkpoint")


def run(bench: ServeBench, *, console: Console | None = None) -> dict[str, Any]:
    """Runs every server on every checkpoint; {"machine", "rows", "summary"}.

    A server that cannot run gets rows with `absent`, the reason, in place of figures.
    """
    console = console or Console(stderr=True)
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"[yellow]This machine is not idle (load {load:.1f}): the figures will mislead.")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="expertmesh-bench-") as workdir:
        for name in bench.checkpoints:
            directory = Path(name) if Path(name).is_dir() else preset_checkpoint(name)
            rows += _run_checkpoint(bench, name, directory, Path(workdir), console)
    machine = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_start": round(load, 2),
        "torch": torch.__version__,
    }
    return {"machine": machine, "rows": rows, "summary": summarise_rows(rows)}


def summarise_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """checkpoint -> "N streams" -> our first server's output tokens/s over each other server's."""
    summary: dict[str, Any] = {}
    for row in rows:
        if "absent" in row or not row["server"].startswith("expertmesh"):
            continue
        ratios = summary.setdefault(row["checkpoint"], {}).setdefault(f"{row['streams']} streams", {})
        if ratios:
            continue
        ratios["server"] = row["server"]
        for other in rows:
            same = (other["checkpoint"], other["streams"]) == (row["checkpoint"], row["streams"])
            if same and other is not row and "absent" not in other:
                ratio = row["output_tokens_per_s"] / other["output_tokens_per_s"]
                ratios[f"over {other['server']}"] = round(ratio, 3)
    return summary


def _run_checkpoint(
    bench: ServeBench, name: str, directory: Path, workdir: Path, console: Console
) -> list[dict[str, Any]]:
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    measured: dict[tuple[str, int], list[Wave]] = {}
    absent: dict[str, str] = {}
    for round_index in range(bench.rounds):
        for server in bench.servers:
            if server in absent:
                continue
            label = f"{name} · {server} · round {round_index + 1}/{bench.rounds}"
            try:
                with console.status(f"{label}: starting"):
                    waves = _waves(bench, vocab_size, seed=round_index)
                    outcome = _measure(bench, server, directory, waves, workdir)
            except MeshError as error:
                absent[server] = str(error)
                console.print(f"{label}: absent: {error}", style="yellow", markup=False)
                continue
            for streams, wave in outcome.items():
                result = wave.figures
                measured.setdefault((server, streams), []).append(wave)
                console.print(
                    f"{label}: {streams} streams, {result.output_tokens_per_s:.1f} tok/s, "
                    f"first token {result.ttft_ms_p50:.0f} ms, then {result.itl_ms_p50:.1f} ms"
                )
    rows: list[dict[str, Any]] = []
    for server in bench.servers:
        for streams in bench.streams:
            row: dict[str, Any] = {"server": server, "checkpoint": name, "streams": streams}
            if results := measured.get((server, streams)):
                medians = [asdict(wave.figures) for wave in results]
                row |= {key: round(statistics.median(m[key] for m in medians), 3) for key in FIGURES}
                row["rounds"] = len(results)
                if parts := results[0].time_shares:
                    row["time_shares"] = {
                        part: round(statistics.median(wave.time_shares[part] for wave in results), 3) for part in parts
                    }
            if server in absent:
                row["absent"] = absent[server]
            rows.append(row)
    return rows


def _waves(bench: ServeBench, vocab_size: int, *, seed: int) -> list[tuple[int, list[list[int]]]]:
    """(streams, prompts) in the order in which they are sent: for each concurrency a warm-up, then the real one.

    At low concurrency four requests follow each other, so that one slow one does not make the figure.
    """
    waves: list[tuple[int, list[list[int]]]] = []
    for streams in bench.streams:
        for count in (streams, max(streams, 4)):
            prompt_seed = seed * 1000 + len(waves)
            prompts = build_prompts(count, bench.prompt_tokens, vocab_size=vocab_size, seed=prompt_seed)
            waves.append((streams, prompts))
    return waves


def _measure(
    bench: ServeBench,
    server: str,
    directory: Path,
    waves: Sequence[tuple[int, list[list[int]]]],
    workdir: Path,
) -> dict[int, Wave]:
    """One server's measured waves by concurrency; raises MeshError where it cannot run."""
    if server.startswith("transformers-"):
        mode = server.removeprefix("transformers-")
        return _measure_transformers(mode, directory, waves, workdir, bench)
    with contextlib.ExitStack() as stack:
        if OURS.fullmatch(server):
            url = bench.url
            if url is None:
                ours = expertmesh_server(server, directory, dtype=bench.dtype, groups=bench.groups, workdir=workdir)
                url = stack.enter_context(ours.running(workdir))
        else:
            if bench.vllm_python is None:
                raise MeshError(f"not installed: name its interpreter with --vllm-python or {VLLM_PYTHON_VARIABLE}")
            dtype = server.partition("-")[2] or bench.dtype
            peer = vllm_server(server, bench.vllm_python, directory, dtype=dtype)
            url = stack.enter_context(peer.running(workdir))
        # The measured wave of a concurrency overwrites its warm-up.
        return {streams: _send(url, prompts, bench, streams) for streams, prompts in waves}


def _send(url: str, prompts: list[list[int]], bench: ServeBench, streams: int) -> Wave:
    before = step_seconds(url)
    timings = asyncio.run(send_load(url, prompts, max_tokens=bench.output_tokens, streams=streams))
    wall_s = max(t.token_times[-1] for t in timings) - min(t.sent for t in timings)
    return Wave(figures=summarise(timings), time_shares=shares_of(before, step_seconds(url), wall_s))


def _measure_transformers(
    mode: str,
    directory: Path,
    waves: Sequence[tuple[int, list[list[int]]]],
    workdir: Path,
    bench: ServeBench,
) -> dict[int, Wave]:
    """transformers has no queue of ours: a wave is cut into batches of its concurrency."""
    batches = [
        (index, streams, prompts[start : start + streams])
        for index, (streams, prompts) in enumerate(waves)
        for start in range(0, len(prompts), streams)
    ]
    job = {
        "waves": [prompts for _, _, prompts in batches],
        "max_tokens": bench.output_tokens,
        "dtype": bench.dtype,
    }
    log, result = workdir / f"transformers-{mode}.log", workdir / f"transformers-{mode}.json"
    argv = (sys.executable, "-m", "cluster.bench.transformers_peer", str(directory), mode, str(result))
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with child_process(argv, env=env, log=log, stdin=json.dumps(job)) as process:
        try:
            process.wait(TRANSFORMERS_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise MeshError(f"not done after {TRANSFORMERS_TIMEOUT_S} s") from error
        if process.returncode != 0 or not result.exists():
            raise MeshError(f"does not run this checkpoint:\n{log_tail(log, 3)}")
    timings: dict[int, list[RequestTiming]] = {}
    last_wave_of = {streams: index for index, streams, _ in batches}
    for (index, streams, _), batch in zip(batches, json.loads(result.read_text()), strict=True):
        if index == last_wave_of[streams]:
            timings.setdefault(streams, []).extend(
                RequestTiming(sent=t["sent"], token_times=tuple(t["token_times"]), num_tokens=len(t["token_times"]))
                for t in batch
            )
    return {streams: Wave(figures=summarise(wave_timings)) for streams, wave_timings in timings.items()}


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command(
    checkpoint: Annotated[
        list[str] | None, typer.Option(help=f"Preset ({', '.join(PRESETS)}) or directory; repeatable.")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(help="expertmesh-<transport>[-<quantization>], vllm, transformers-<mode>; repeatable."),
    ] = None,
    streams: Annotated[list[int] | None, typer.Option(help="Requests at a time; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of every server; figures are medians.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="Prompt length.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    groups: Annotated[int, typer.Option(help="Expert groups of the servers started here.")] = 2,
    dtype: Annotated[str, typer.Option(help="Weights and activations of every server.")] = "float32",
    url: Annotated[str | None, typer.Option(help="Measure this running server as ours.")] = None,
    vllm_python: Annotated[
        Path | None,
        typer.Option(envvar=VLLM_PYTHON_VARIABLE, help="Interpreter of an environment with vLLM for CPU."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Output tokens/s and latencies of this server and its peers on one checkpoint."""
    console = Console(stderr=True)
    try:
        with interruptible():
            bench = ServeBench(
                checkpoints=tuple(checkpoint or PRESETS),
                servers=tuple(server or DEFAULT_SERVERS),
                streams=tuple(streams or (1, 16)),
                rounds=rounds,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                groups=groups,
                dtype=dtype,
                url=url,
                vllm_python=vllm_python,
            )
            result = run(bench, console=console)
    except KeyboardInterrupt as error:
        console.print("interrupted; every server started here is stopped")
        raise typer.Exit(130) from error
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        Console().print(_table(result))


def _table(result: dict[str, Any]) -> Table:
    table = Table("checkpoint", "server", "streams", "tok/s", "TTFT p50 ms", "ITL p50 ms", "ITL p99 ms")
    for row in result["rows"]:
        figures = ("absent", "", "", "") if "absent" in row else tuple(f"{row[key]:.1f}" for key in FIGURES[:4])
        table.add_row(row["checkpoint"], row["server"], str(row["streams"]), *figures)
    return table
