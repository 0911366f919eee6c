"""`expertmesh bench autoscale`: engines and expert groups that follow a load up and down on this machine's Ray.

Streams of greedy completions come and go; replicas, queue and latency are recorded all along, and every answer is
compared with what transformers' own `generate` makes of the same prompt.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import statistics
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import httpx
import ray
import torch
import typer
from ray import serve
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.app import build
from cluster.bench.autoscale_picture import draw
from cluster.bench.servers import free_port
from cluster.local_ray import start_local_ray
from cluster.running_app import APPLICATION
from experts.errors import ConfigError

DEMO_MODEL = Path(__file__).parents[2] / "deploy" / "demo-model"
MODEL_NAME = "autoscale"
TIMEOUT_S = 600.0
SAMPLE_S = 0.5
PROMPTS = (
    "def main(",
    "import os\n\n\ndef read(path):\n",
    "class Stack:\n    def __init__(self):\n",
    "for i in range(",
    "Once upon a time",
    "The quick brown fox",
    "if __name__ ==",
    "return [x for x in",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """streams: clients at a time. pause_s: what each rests between two requests. new_tokens: length of an answer."""

    name: str
    streams: int
    seconds: float
    new_tokens: int
    pause_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleBench:
    """What to run.

    checkpoint: directory of a model that float32 on a CPU can serve
    groups:     expert groups, each of one or two replicas
    streams:    clients at the peak
    seconds:    length of the peak; the quiet before is a third of it, the quiet after as long as it
    """

    checkpoint: Path = DEMO_MODEL
    groups: int = 2
    streams: int = 8
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not (self.checkpoint / "config.json").exists():
            raise ConfigError(f"--checkpoint {self.checkpoint}: no checkpoint is there; name a directory with one")
        for key in ("groups", "streams", "seconds"):
            if getattr(self, key) < 1:
                raise ConfigError(f"--{key} is {getattr(self, key)}: give 1 or more")

    def phases(self) -> tuple[Phase, ...]:
        """One client now and then, all of them without rest, and one now and then again."""
        calm = Phase(name="calm", streams=1, seconds=self.seconds / 3, new_tokens=8, pause_s=1.0)
        peak = Phase(name="peak", streams=self.streams, seconds=self.seconds, new_tokens=48)
        return calm, peak, replace(calm, name="calm again", seconds=self.seconds)

    def document(self) -> dict[str, Any]:
        """The mesh.yaml of the run."""
        delays = {"look_back_period_s": 5, "upscale_delay_s": 2, "downscale_delay_s": 5}
        policy = {
            "policy_function": "cluster.autoscale.policies:TokensPerSecond",
            # Between what one calm client makes and what any machine makes of the peak.
            "policy_kwargs": {"target_tokens_per_s": 500, "upscale_cooldown_s": 5, "downscale_cooldown_s": 5},
        }
        return {
            "model": {"source": str(self.checkpoint.resolve()), "served_name": MODEL_NAME},
            # One engine lets half of the peak wait.
            "engine": {"max_num_seqs": max(1, self.streams // 2)},
            # Without failover nothing hides a call that a departing replica did not answer.
            "experts": {"groups": self.groups, "listen_host": "127.0.0.1", "on_expert_loss": "fail"},
            "autoscaling": {
                "engine": {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4, **delays},
                "experts": {"min_replicas": 1, "max_replicas": 2, "policy": policy, **delays},
            },
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request; times in seconds since the run began. error: empty where the answer was the expected one."""

    sent: float
    first_token: float
    done: float
    error: str = ""


@dataclass(kw_only=True, slots=True)
class Run:
    """What happened. samples: dicts of `at`, `engines`, `groups` (replicas of each), `in_flight`, `waiting`."""

    began: float = field(default_factory=time.monotonic)
    phases: list[tuple[float, str]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    in_flight: int = 0
    waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def now(self) -> float:
        return time.monotonic() - self.began


def run(bench: AutoscaleBench, console: Console) -> Run:
    """Starts Ray here, serves, sends the load, and takes everything down again."""
    console.print("transformers' own answers ...")
    expected = {length: _expected(bench.checkpoint, length) for length in {p.new_tokens for p in bench.phases()}}
    # Serve's ten seconds between two reports would make a run long and its picture coarse. This process read Serve's
    # defaults before, and warns of look-backs below them.
    os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
    warnings.filterwarnings("ignore", "`look_back_period_s`", FutureWarning)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    port = free_port()
    console.print("Ray and the application ...")
    start_local_ray()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": None})
        serve.run(build(bench.document()), name=APPLICATION, route_prefix="/")
        return _send(bench, f"http://127.0.0.1:{port}", expected, console)
    finally:
        serve.shutdown()
        ray.shutdown()


def summarise(result: Run) -> dict[str, Any]:
    """JSON-ready: requests, failures, exactness, latency by phase, most and last replicas."""
    errors = [request.error for request in result.requests if request.error]
    starts = [*(start for start, _ in result.phases), float("inf")]
    phases = []
    for index, (start, name) in enumerate(result.phases):
        within = [r for r in result.requests if start <= r.sent < starts[index + 1]]
        first = [(r.first_token - r.sent) * 1e3 for r in within if not r.error]
        whole = [(r.done - r.sent) * 1e3 for r in within if not r.error]
        phases.append(
            {
                "phase": name,
                "requests": len(within),
                "ttft_ms_p50": round(statistics.median(first), 1) if first else None,
                "e2e_ms_p50": round(statistics.median(whole), 1) if whole else None,
            }
        )
    engines = [sample["engines"] for sample in result.samples]
    groups = list(zip(*(sample["groups"] for sample in result.samples), strict=True))
    return {
        "requests": len(result.requests),
        "failures": len(errors),
        "outputs_exact": not errors,
        "errors": sorted(set(errors))[:5],
        "phases": phases,
        "engines": {"first": engines[0], "most": max(engines), "last": engines[-1]},
        "groups": {
            "first": [counts[0] for counts in groups],
            "most": [max(counts) for counts in groups],
            "last": [counts[-1] for counts in groups],
        },
    }


def _expected(checkpoint: Path, new_tokens: int) -> dict[str, str]:
    """Prompt -> what transformers' greedy decoding adds to it."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    answers = {}
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers[prompt] = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return answers


def _send(bench: AutoscaleBench, url: str, expected: dict[int, dict[str, str]], console: Console) -> Run:
    result, over = Run(), threading.Event()
    recorder = threading.Thread(target=_record, args=(result, over), name="recorder")
    recorder.start()
    try:
        for phase in bench.phases():
            console.print(f"{phase.name}: {phase.streams} streams for {phase.seconds:g} s")
            result.phases.append((result.now(), phase.name))
            stop = threading.Event()
            with ThreadPoolExecutor(phase.streams) as clients:
                for offset in range(phase.streams):
                    clients.submit(_client, url, phase, expected[phase.new_tokens], offset, stop, result)
                stop.wait(phase.seconds)
                stop.set()
    finally:
        over.set()
        recorder.join()
    return result


def _client(url: str, phase: Phase, expected: dict[str, str], offset: int, stop: threading.Event, result: Run) -> None:
    prompts = itertools.cycle(PROMPTS[offset % len(PROMPTS) :] + PROMPTS[: offset % len(PROMPTS)])
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        for prompt in prompts:
            request = _request(client, prompt, phase.new_tokens, expected[prompt], result)
            with result.lock:
                result.requests.append(request)
            if stop.wait(phase.pause_s):
                return


def _request(client: httpx.Client, prompt: str, new_tokens: int, expected: str, result: Run) -> Request:
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    text, error, sent, first = "", "", result.now(), None
    with result.lock:
        result.in_flight += 1
        result.waiting += 1
    try:
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                error = f"{response.status_code}: {response.read().decode(errors='replace')[:300]}"
            for line in () if error else response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    error = str(event["error"])
                    break
                if first is None:
                    first = result.now()
                    with result.lock:
                        result.waiting -= 1
                text += "".join(choice["text"] for choice in event["choices"])
    except httpx.HTTPError as failure:
        error = f"{type(failure).__name__}: {failure}"
    if not error and text != expected:
        error = f"other output for {prompt!r}"
    done = result.now()
    with result.lock:
        result.in_flight -= 1
        if first is None:
            result.waiting -= 1
    return Request(sent=sent, first_token=done if first is None else first, done=done, error=error)


def _record(result: Run, over: threading.Event) -> None:
    """Sample what runs until `over`."""
    controller = serve.get_deployment_handle("controller", APPLICATION)
    while True:
        engine = serve.status().applications[APPLICATION].deployments["engine"].replica_states
        groups = controller.status.remote().result(timeout_s=TIMEOUT_S)["groups"]
        result.samples.append(
            {
                "at": result.now(),
                "engines": engine.get("RUNNING", 0),
                "groups": [sum(r["ready"] and not r["leaving"] for r in group["replicas"]) for group in groups],
                "in_flight": result.in_flight,
                "waiting": result.waiting,
            }
        )
        if over.wait(SAMPLE_S):
            return


def command(
    checkpoint: Annotated[Path, typer.Option(help="Directory of the model to serve.")] = DEMO_MODEL,
    groups: Annotated[int, typer.Option(help="Expert groups.")] = 2,
    streams: Annotated[int, typer.Option(help="Clients at the peak.")] = 8,
    seconds: Annotated[float, typer.Option(help="Length of the peak; the whole run is 2.3 times as long.")] = 60.0,
    picture: Annotated[Path | None, typer.Option(help="Draw replicas, queue and latency over time (.png).")] = None,
) -> None:
    """Replicas that follow a load up and down, with every answer checked; prints JSON."""
    bench = AutoscaleBench(checkpoint=checkpoint, groups=groups, streams=streams, seconds=seconds)
    if picture is not None and (picture.suffix.lower() != ".png" or not picture.parent.is_dir()):
        raise ConfigError(f"--picture {picture}: give a name that ends in .png, in a directory that exists")
    with contextlib.redirect_stdout(sys.stderr):  # Ray's farewells are not JSON
        result = run(bench, Console(stderr=True))
    if picture is not None:
        draw(result.samples, result.requests, result.phases, picture)
    summary = summarise(result)
    print(json.dumps(summary, indent=2))
    if summary["failures"]:
        raise typer.Exit(1)
