"""`expertmesh bench dispatch`: what a layer's dispatch and combine cost, beside a bare gRPC echo of the same bytes.

The groups do no arithmetic (`cluster.bench.dispatch_peer`), so what is left is the router's, the wire's and the
group's own handling. Router and echo take turns, call by call, in one process against the same peers; figures are
medians. The echo sends each peer exactly as many bytes as the router does and gets as many back, over one stream per
peer that is read by the thread that waits: the quickest way that grpcio has.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Annotated, Any

import grpc
import ray
import torch
import typer
from rich.console import Console
from rich.table import Table

from cluster.bench.dispatch_copies import copies_rows
from cluster.bench.dispatch_peer import ECHO, IdleGroup
from cluster.bench.dispatch_peers import grpc_peers
from cluster.local_ray import start_local_ray
from experts.errors import ConfigError
from experts.wire.codec import MAX_MESSAGE_BYTES, encode_call
from router_service.combine import Combiner
from router_service.dispatch import plan_dispatch
from router_service.gating.build import build_gate
from router_service.gating.gate import Gate, GateSpec
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.router import Router
from router_service.slot_index import build_slot_index
from router_service.transport.base import Transport
from router_service.transport.grpc_stream import GrpcTransport
from router_service.transport.ray_group import serve_calls
from router_service.transport.ray_refs import RayRefsTransport

_NAMESPACE = "expertmesh-bench"


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


def run(bench: DispatchBench, *, console: Console | None = None) -> dict[str, Any]:
    """{"machine", "rows", "summary"}; see the README of router_service for the keys."""
    console = console or Console(stderr=True)
    load = os.getloadavg()[0]
    if load > 0.5:
        console.print(f"[yellow]This machine is not idle (load {load:.1f}): the figures will mislead.")
    rows = copies_rows()
    with torch.inference_mode():
        for num_groups in bench.groups:
            for num_tokens in bench.tokens:
                rows.append(_host_row(bench, num_tokens, num_groups))
        if "grpc" in bench.transports:
            console.print("gRPC: router and echo in turns")
            with grpc_peers([((), "127.0.0.1")] * bench.peers) as peers:
                rows += [_grpc_row(bench, num_tokens, peers) for num_tokens in bench.tokens]
        if "ray" in bench.transports:
            console.print("Ray: starting")
            with _ray_peers(bench.peers) as replicas:
                rows += [_ray_row(bench, num_tokens, replicas) for num_tokens in bench.tokens]
    ratios = [row["ratio_to_echo"] for row in rows if "ratio_to_echo" in row]
    alone = [row for row in rows if row["what"] == "gate_plan_combine" and row["groups"] == max(bench.groups)]
    summary = {
        "max_ratio_to_echo": max(ratios, default=None),
        "gate_plan_combine_us_per_token": {
            str(row["tokens"]): round(row["total_us"] / row["tokens"], 3) for row in alone
        },
    }
    machine = {"cores": len(os.sched_getaffinity(0)), "load_at_start": round(load, 2), "torch": torch.__version__}
    return {"machine": machine, "rows": rows, "summary": summary}


def _gate(bench: DispatchBench) -> Gate:
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


def _hidden(bench: DispatchBench, num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, bench.hidden_size, generator=torch.Generator().manual_seed(1))


def _medians(seconds: float, works: Sequence[Callable[[], object]]) -> list[float]:
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


def _host_row(bench: DispatchBench, num_tokens: int, num_groups: int) -> dict[str, Any]:
    """The router's own arithmetic: gate, plan with the gathers that it asks for, combine."""
    gate, hidden_TH = _gate(bench), _hidden(bench, num_tokens)
    index = build_slot_index(balanced({0: bench.num_experts}, num_groups)[0], num_groups)
    chosen = gate(hidden_TH)
    plan = plan_dispatch(index, 0, *chosen)
    partials = [part.call(hidden_TH).hidden_TH.clone() for part in plan.parts]

    def plan_calls() -> None:
        for part in plan_dispatch(index, 0, *chosen).parts:
            part.call(hidden_TH)

    def combine() -> None:
        combiner = Combiner(num_tokens, bench.hidden_size, hidden_TH.device)
        for part, partial_TH in zip(plan.parts, partials, strict=True):
            combiner.add(part.tokens_T, partial_TH)
        combiner.result(torch.float32)

    gate_us, plan_us, combine_us = _medians(bench.seconds / 4, (lambda: gate(hidden_TH), plan_calls, combine))
    return {
        "what": "gate_plan_combine",
        "tokens": num_tokens,
        "groups": num_groups,
        "gate_us": round(gate_us, 1),
        "plan_us": round(plan_us, 1),
        "combine_us": round(combine_us, 1),
        "total_us": round(gate_us + plan_us + combine_us, 1),
    }


class _Echo:
    """A bare stream to one peer."""

    def __init__(self, address: str) -> None:
        limits = ("grpc.max_receive_message_length", "grpc.max_send_message_length")
        channel = grpc.insecure_channel(address, options=[(name, MAX_MESSAGE_BYTES) for name in limits])
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        self._replies = channel.stream_stream(ECHO)(iter(self._requests.get, None))

    def send(self, data: bytes) -> None:
        self._requests.put(data)

    def receive(self) -> None:
        next(self._replies)

    def close(self) -> None:
        self._requests.put(None)


def _grpc_row(bench: DispatchBench, num_tokens: int, peers: Sequence[tuple[str, str]]) -> dict[str, Any]:
    replicas = [
        GroupReplica(group=group, replica=f"peer-{group}", node="bench", address=address)
        for group, (address, _) in enumerate(peers)
    ]
    echoes = [_Echo(address) for _, address in peers]
    router, choice, hidden_TH, payloads = _prepare(bench, num_tokens, replicas, GrpcTransport())

    def echo() -> None:
        for each, data in zip(echoes, payloads, strict=True):
            each.send(data)
        for each in echoes:
            each.receive()

    try:
        router_us, echo_us = _medians(bench.seconds, (lambda: router.dispatch(0, hidden_TH, *choice).result(), echo))
    finally:
        router.close()
        for each in echoes:
            each.close()
    return {
        "what": "dispatch_combine",
        "transport": "grpc",
        "tokens": num_tokens,
        "peers": len(peers),
        "bytes_each_way": sum(map(len, payloads)),
        "p50_us": round(router_us, 1),
        "echo_p50_us": round(echo_us, 1),
        "ratio_to_echo": round(router_us / echo_us, 3),
    }


def _ray_row(bench: DispatchBench, num_tokens: int, replicas: Sequence[GroupReplica]) -> dict[str, Any]:
    router, choice, hidden_TH, payloads = _prepare(bench, num_tokens, replicas, RayRefsTransport(_NAMESPACE))
    (router_us,) = _medians(bench.seconds, (lambda: router.dispatch(0, hidden_TH, *choice).result(),))
    router.close()
    return {
        "what": "dispatch_combine",
        "transport": "ray",
        "tokens": num_tokens,
        "peers": len(replicas),
        "bytes_each_way": sum(map(len, payloads)),
        "p50_us": round(router_us, 1),
    }


def _prepare(
    bench: DispatchBench, num_tokens: int, replicas: Sequence[GroupReplica], transport: Transport
) -> tuple[Router, tuple[torch.Tensor, torch.Tensor], torch.Tensor, list[bytes]]:
    """(router, gate output, hidden_TH, what the router will send to each peer)."""
    num_groups = len(replicas)
    holders = balanced({0: bench.num_experts}, num_groups)
    table = PlacementTable(version=1, num_groups=num_groups, holders=holders, replicas=tuple(replicas))
    router = Router(transport, {}, recovery_timeout_s=30.0)
    router.update(table)
    hidden_TH = _hidden(bench, num_tokens)
    choice = _gate(bench)(hidden_TH)
    plan = plan_dispatch(build_slot_index(holders[0], num_groups), 0, *choice)
    by_group = {part.group: encode_call(part.call(hidden_TH)) for part in plan.parts}
    return (
        router,
        (choice.expert_ids_TK, choice.weights_TK),
        hidden_TH,
        [by_group.get(group, b"") for group in range(num_groups)],
    )


class _Peer:
    """A Ray actor with a group that does no arithmetic."""

    def __init__(self, name: str) -> None:
        torch.set_num_threads(1)
        serve_calls(name, IdleGroup())

    def ready(self) -> bool:
        return True


@contextmanager
def _ray_peers(count: int) -> Iterator[list[GroupReplica]]:
    start_local_ray()
    try:
        names = [f"peer-{group}" for group in range(count)]
        actor_class = ray.remote(num_cpus=0)(_Peer)
        actors = [actor_class.options(name=name, namespace=_NAMESPACE).remote(name) for name in names]
        ray.get([actor.ready.remote() for actor in actors])
        yield [
            GroupReplica(group=group, replica=name, node="bench", address="", actor=name)
            for group, name in enumerate(names)
        ]
    finally:
        ray.shutdown()


def command(
    tokens: Annotated[list[int] | None, typer.Option(help="Batch size; repeatable.")] = None,
    peers: Annotated[int, typer.Option(help="Expert groups, a process each.")] = 2,
    groups: Annotated[
        list[int] | None, typer.Option(help="Group count of the gate, plan and combine rows; repeatable.")
    ] = None,
    transport: Annotated[list[str] | None, typer.Option(help="grpc or ray; repeatable.")] = None,
    num_experts: Annotated[int, typer.Option(help="Experts of the layer.")] = 256,
    top_k: Annotated[int, typer.Option(help="Experts of a token.")] = 8,
    hidden_size: Annotated[int, typer.Option(help="Width of the hidden states, float32.")] = 2048,
    seconds: Annotated[float, typer.Option(help="Time for each row.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Cost of a layer's dispatch and combine, beside a bare gRPC echo of the same bytes."""
    defaults = DispatchBench()
    result = run(
        DispatchBench(
            tokens=tuple(tokens or defaults.tokens),
            peers=peers,
            groups=tuple(groups or defaults.groups),
            transports=tuple(transport or defaults.transports),
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=hidden_size,
            seconds=seconds,
        )
    )
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = Table("what", "tokens", "groups", "µs", "echo µs", "ratio")
    for row in result["rows"]:
        if row["what"] == "copies_per_token":
            continue
        if row["what"] == "gate_plan_combine":
            total = f"{row['total_us']} = {row['gate_us']} + {row['plan_us']} + {row['combine_us']}"
            table.add_row("gate + plan + combine", str(row["tokens"]), str(row["groups"]), total)
        else:
            echo, ratio = str(row.get("echo_p50_us", "")), str(row.get("ratio_to_echo", ""))
            name = f"dispatch + combine, {row['transport']}"
            table.add_row(name, str(row["tokens"]), str(row["peers"]), str(row["p50_us"]), echo, ratio)
    copies = Table("copies per token", "nodes", "per expert", "per group", "per node", "exact", "restrict")
    for row in result["rows"]:
        if row["what"] == "copies_per_token":
            copies.add_row(*map(str, list(row.values())[1:]))
    Console().print(copies, table)
