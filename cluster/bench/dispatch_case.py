"""What every row of `expertmesh bench dispatch` begins with: the batch, the router, and taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from experts.errors import ConfigError
from experts.wire.codec import encode_call
from router_service.dispatch import plan_dispatch
from router_service.gating.build import build_gate
from router_service.gating.gate import Gate, GateSpec
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.slot_index import build_slot_index
from router_service.transport.base import Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchBench:
    """What to run. The gate is DeepSeek-V3's: sigmoid, 8 groups of which 4 are eligible.

    tokens:     batch sizes
    peers:      expert groups, a process each
    groups:     group counts of the gate + plan + combine rows, which need no process
    transports: grpc, ray
    """

    tokens: tuple[int, ...] = (1, 16, 256, 2048)
    peers: int = 2
    groups: tuple[int, ...] = (2, 8, 32)
    transports: tuple[str, ...] = ("grpc", "ray")
    num_experts: int = 256
    top_k: int = 8
    hidden_size: int = 2048
    seconds: float = 2.0

    def __post_init__(self) -> None:
        for key in ("peers", "num_experts", "top_k", "hidden_size"):
            if getattr(self, key) < 1:
                raise ConfigError(f"--{key.replace('_', '-')} is {getattr(self, key)}: give 1 or more")
        if min(self.tokens, default=0) < 1 or min(self.groups, default=0) < 1:
            raise ConfigError("--tokens and --groups take numbers from 1")
        if unknown := set(self.transports) - {"grpc", "ray"}:
            raise ConfigError(f"--transport {', '.join(sorted(unknown))} is not one of grpc, ray")
        if self.num_experts % 8 or self.top_k > self.num_experts // 2:
            raise ConfigError("--num-experts must be a multiple of 8, and twice --top-k or more")


def make_gate(bench: DispatchBench) -> Gate:
    spec = GateSpec(
        system="deepseek_v3",
        num_experts=bench.num_experts,
        num_experts_per_tok=bench.top_k,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
    )
    generator = torch.Generator().manual_seed(0)
    weight_EH = torch.randn(bench.num_experts, bench.hidden_size, generator=generator) / bench.hidden_size**0.5
    return build_gate(spec, weight_EH, torch.zeros(bench.num_experts))


def make_hidden(bench: DispatchBench, num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, bench.hidden_size, generator=torch.Generator().manual_seed(1))


def medians(seconds: float, works: Sequence[Callable[[], object]]) -> list[float]:
    """Median microseconds of each of `works`, run in turns for `seconds`, five turns at least."""
    for work in works:
        work()
        work()
    times: list[list[float]] = [[] for _ in works]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append((time.perf_counter() - start) * 1e6)
    return [statistics.median(taken) for taken in times]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Gated tokens. payloads: what the router will send to each group"""

    hidden_TH: torch.Tensor
    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    payloads: list[bytes]

    def through(self, router: Router) -> torch.Tensor:
        """Dispatch and combine."""
        return router.dispatch(0, self.hidden_TH, self.expert_ids_TK, self.weights_TK).result()

    def row(self, transport: str, p50_us: float) -> dict[str, Any]:
        """A row of the report, which begins with these."""
        return {
            "what": "dispatch_combine",
            "transport": transport,
            "tokens": len(self.hidden_TH),
            "peers": len(self.payloads),
            "bytes_each_way": sum(map(len, self.payloads)),
            "p50_us": round(p50_us, 1),
        }


def make_batch(bench: DispatchBench, num_tokens: int, num_groups: int) -> Batch:
    """So many tokens for so many groups."""
    hidden_TH = make_hidden(bench, num_tokens)
    choice = make_gate(bench)(hidden_TH)
    index = build_slot_index(balanced({0: bench.num_experts}, num_groups)[0], num_groups)
    by_group = {part.group: encode_call(part.call(hidden_TH)) for part in plan_dispatch(index, 0, *choice).parts}
    return Batch(
        hidden_TH=hidden_TH,
        expert_ids_TK=choice.expert_ids_TK,
        weights_TK=choice.weights_TK,
        payloads=[by_group.get(group, b"") for group in range(num_groups)],
    )


def make_router(bench: DispatchBench, replicas: Sequence[GroupReplica], transport: Transport) -> Router:
    """A router to `replicas`, one of each group."""
    num_groups = len(replicas)
    holders = balanced({0: bench.num_experts}, num_groups)
    router = Router(transport, {}, recovery_timeout_s=30.0)
    router.update(PlacementTable(version=1, num_groups=num_groups, holders=holders, replicas=tuple(replicas)))
    return router
