"""`expertmesh bench experts`: one MoE layer's experts on this machine's CPU, beside transformers' own.

Every variant gets the same weights and the same routed tokens, in one process and in turns, so that a change of the
machine's mood meets all of them. A row's time covers what a layer has to do once the gate has spoken: sort by
expert, multiply, weight and sum. Weights are bfloat16 numbers, as in nearly every published checkpoint:

    lossless   quantization none of a bfloat16 checkpoint
    float32    quantization none of a float32 checkpoint with the same numbers
    int8       quantization int8
    eager, grouped_mm, batched_mm   transformers with the same numbers in float32
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from experts.ops.cpu_backend import CpuBackend
from experts.ops.expert_mlp import expert_mlp_reference
from experts.ops.sort import sort_by_expert
from experts.spec import ExpertSpec, ExpertWeights

TOKENS = (1, 8, 32, 512)
OURS = {"lossless": ("none", torch.bfloat16), "float32": ("none", torch.float32), "int8": ("int8", torch.float32)}
TRANSFORMERS = ("eager", "grouped_mm", "batched_mm")

# batched_mm copies the weights of every routed row; where that takes more, it is not run.
_MOST_GATHERED_BYTES = 2 << 30
_NUM_INPUTS = 8
# What `memory` reads in turn: more than any cache.
_MEMORY_BYTES = 1 << 29


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A layer: E experts of H x I, K of them for each token."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int

    @property
    def expert_params(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.intermediate_size


SHAPES = {
    "Mix": Shape(num_experts=8, hidden_size=1024, intermediate_size=3584, top_k=2),
    "DS": Shape(num_experts=64, hidden_size=1024, intermediate_size=256, top_k=8),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """Tokens and what a gate chose for them."""

    hidden_TH: torch.Tensor
    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor


Variant = Callable[[Routed], torch.Tensor]


def run(
    *,
    shapes: Mapping[str, Shape] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    threads: int = 2,
    seconds: float = 6.0,
) -> dict[str, Any]:
    """Measure and compare.

    seconds: how long each combination of shape and tokens is measured

    rows: shape, tokens, variant, ms (median), relative_error (norm of the difference to float64 over its norm). Two
    variants are not experts and have relative_error 0: `torch.mm` is a square float32 product of the same number of
    operations, `memory` the reading of as many bytes as `lossless` holds for the experts that one token hits.
    summary: ratios of times, more than 1 is faster than transformers' fastest variant of the same row, of `lossless`
    and of `int8`; mm_fraction_t512 and read_fraction_t1 are how much of `torch.mm`'s and `memory`'s rate `lossless`
    reaches, by shape.
    """
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for name, shape in shapes.items():
        bench = _ShapeBench(shape, threads)
        for num_tokens in tokens:
            for variant, ms, error in bench.measure(num_tokens, seconds):
                rows.append(
                    {"shape": name, "tokens": num_tokens, "variant": variant, "ms": ms, "relative_error": error}
                )
    return {"rows": rows, "summary": summarise(rows)}


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`run`'s summary of its rows."""
    ms = {(row["shape"], row["tokens"], row["variant"]): row["ms"] for row in rows}
    points = sorted({key[:2] for key in ms})
    fastest = {
        point: min(ms[*point, variant] for variant in TRANSFORMERS if (*point, variant) in ms) for point in points
    }

    def ratios(variant: str) -> list[float]:
        return [fastest[point] / ms[*point, variant] for point in points]

    def fraction(of: str, tokens: int) -> dict[str, float]:
        return {shape: ms[shape, t, of] / ms[shape, t, "lossless"] for shape, t in points if t == tokens}

    return {
        "geomean_vs_transformers": statistics.geometric_mean(ratios("lossless")),
        "min_vs_transformers": min(ratios("lossless")),
        "int8_geomean_vs_transformers": statistics.geometric_mean(ratios("int8")),
        "mm_fraction_t512": fraction("torch.mm", 512),
        "read_fraction_t1": fraction("memory", 1),
    }


class _ShapeBench:
    """All variants of one shape, with the same weights."""

    def __init__(self, shape: Shape, threads: int) -> None:
        self._shape = shape
        hidden, intermediate = shape.hidden_size, shape.intermediate_size
        self._config = MixtralConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_local_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
        self._theirs = MixtralExperts(self._config).requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        self._theirs.gate_up_proj.normal_(std=hidden**-0.5, generator=generator)
        self._theirs.down_proj.normal_(std=intermediate**-0.5, generator=generator)
        for parameter in self._theirs.parameters():
            parameter.copy_(parameter.bfloat16())
        self._spec = ExpertSpec(hidden_size=hidden, intermediate_size=intermediate)
        self._weights = [
            ExpertWeights(up_2IH=up, down_HI=down)
            for up, down in zip(self._theirs.gate_up_proj, self._theirs.down_proj, strict=True)
        ]
        # A group runs its calls in a thread that torch does not split work for: the backend spreads whole experts.
        self._group_thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._backends: dict[str, CpuBackend] = {}
        for variant, (quantization, dtype) in OURS.items():
            backend = CpuBackend(self._spec, quantization=quantization, num_threads=threads)
            for slot, weights in enumerate(self._weights):
                up, down = weights.up_2IH.to(dtype), weights.down_HI.to(dtype)
                backend.load(slot, ExpertWeights(up_2IH=up, down_HI=down))
            self._backends[variant] = backend

    def measure(self, num_tokens: int, seconds: float) -> Iterator[tuple[str, float, float]]:
        """(variant, median ms, relative error) of every variant."""
        inputs = self._inputs(num_tokens)
        expected = self._reference(inputs[0])
        variants = self._variants(num_tokens)
        errors = {
            name: ((call(inputs[0]) - expected).norm() / expected.norm()).item() for name, call in variants.items()
        }
        variants |= self._baselines(num_tokens)
        times: dict[str, list[float]] = {name: [] for name in variants}
        end = time.monotonic() + seconds
        for turn in itertools.count():
            for name, call in variants.items():
                first, second = inputs[turn % _NUM_INPUTS], inputs[(turn + 1) % _NUM_INPUTS]
                if name in OURS:
                    taken = self._group_thread.submit(_timed, call, first, second).result()
                else:
                    taken = _timed(call, first, second)
                times[name].append(taken)
            if turn >= 4 and time.monotonic() > end:
                break
        for name in variants:
            yield name, statistics.median(times[name]) * 1e3, errors.get(name, 0.0)

    def _inputs(self, num_tokens: int) -> list[Routed]:
        """Single tokens ask for other experts each time, in turn over all, so that no weight is still in a cache."""
        generator = torch.Generator().manual_seed(num_tokens)
        shape, inputs = self._shape, []
        for index in range(_NUM_INPUTS):
            ids_TK = torch.rand(num_tokens, shape.num_experts, generator=generator).topk(shape.top_k).indices
            if num_tokens == 1:
                ids_TK = (torch.arange(shape.top_k) + index * shape.top_k)[None] % shape.num_experts
            weights_TK = torch.rand(num_tokens, shape.top_k, generator=generator)
            inputs.append(
                Routed(
                    hidden_TH=torch.randn(num_tokens, shape.hidden_size, generator=generator),
                    expert_ids_TK=ids_TK,
                    weights_TK=weights_TK / weights_TK.sum(dim=1, keepdim=True),
                )
            )
        return inputs

    def _reference(self, routed: Routed) -> torch.Tensor:
        rows = sort_by_expert(routed.expert_ids_TK, routed.weights_TK)
        hit = [self._weights[expert] for expert in rows.expert_ids_S.tolist()]
        return expert_mlp_reference(self._spec, hit, routed.hidden_TH, *rows[1:])

    def _variants(self, num_tokens: int) -> dict[str, Variant]:
        variants: dict[str, Variant] = {}
        for name, backend in self._backends.items():
            variants[name] = partial(_ours, backend)
        gathered = num_tokens * self._shape.top_k * self._shape.expert_params * 4
        for name in TRANSFORMERS:
            if name != "batched_mm" or gathered <= _MOST_GATHERED_BYTES:
                variants[name] = partial(self._transformers, name)
        return variants

    def _transformers(self, implementation: str, routed: Routed) -> torch.Tensor:
        self._config._experts_implementation = implementation
        out: torch.Tensor = self._theirs(routed.hidden_TH, routed.expert_ids_TK, routed.weights_TK)
        return out

    def _baselines(self, num_tokens: int) -> dict[str, Variant]:
        """What the machine itself takes for as much: a product for 512 tokens, a read of memory for one."""
        if num_tokens == 512:
            side = round((num_tokens * self._shape.top_k * self._shape.expert_params) ** (1 / 3))
            left, right = torch.randn(side, side), torch.randn(side, side)
            return {"torch.mm": lambda _: torch.mm(left, right)}
        if num_tokens == 1:
            values = self._shape.top_k * self._backends["lossless"].nbytes(0) // 4
            pieces = itertools.cycle(torch.ones(_MEMORY_BYTES // 4 // values, values))
            return {"memory": lambda _: next(pieces).sum()}
        return {}


def _timed(call: Variant, first: Routed, second: Routed) -> float:
    """Seconds of the second call: the threads of whatever ran before the first may still be spinning in that."""
    with torch.inference_mode():
        call(first)
        start = time.perf_counter()
        call(second)
        return time.perf_counter() - start


def _ours(backend: CpuBackend, routed: Routed) -> torch.Tensor:
    return backend.forward(routed.hidden_TH, *sort_by_expert(routed.expert_ids_TK, routed.weights_TK))


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Cores that each variant may use.")] = 2,
    seconds: Annotated[float, typer.Option(min=0, help="How long each shape and number of tokens is measured.")] = 6.0,
) -> None:
    """One MoE layer's experts on this CPU, beside transformers' own."""
    result = run(threads=threads, seconds=seconds)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    table = Table("shape", "tokens", "variant", "ms", "relative error")
    for row in result["rows"]:
        table.add_row(
            row["shape"], str(row["tokens"]), row["variant"], f"{row['ms']:.3f}", f"{row['relative_error']:.1e}"
        )
    console = Console()
    console.print(table)
    for name, value in result["summary"].items():
        console.print(f"{name}: {value}")
