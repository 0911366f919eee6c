"""`expertmesh bench dispatch`: what a layer's dispatch and combine cost, beside a bare gRPC echo of the same bytes.

The groups do no arithmetic (`cluster.bench.dispatch_peer`), so what is left is the router's, the wire's and the
group's own handling. Router and echo take turns, call by call, in one process against the same peers; figures are
medians. The echo sends each peer exactly as many bytes as the router does and gets as many back, over one stream per
peer that is read by the thread that waits: the quickest way that grpcio has. In the same way the router takes turns
with itself, once with every payload in shared memory and once with none.
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from cluster.bench.dispatch_case import DispatchBench, make_gate, make_hidden, medians
from cluster.bench.dispatch_copies import copies_rows
from cluster.bench.dispatch_grpc import grpc_row
from cluster.bench.dispatch_peers import grpc_peers
from cluster.bench.dispatch_ray import ray_peers, ray_row
from router_service.combine import Combiner
from router_service.dispatch import plan_dispatch
from router_service.placement import balanced
from router_service.slot_index import build_slot_index


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
            console.print("gRPC: router and echo in turns, then with and without shared memory")
            with grpc_peers([((), "127.0.0.1")] * bench.peers) as peers:
                rows += [grpc_row(bench, num_tokens, peers) for num_tokens in bench.tokens]
        if "ray" in bench.transports:
            console.print("Ray: starting")
            with ray_peers(bench.peers) as replicas:
                rows += [ray_row(bench, num_tokens, replicas) for num_tokens in bench.tokens]
    over_grpc = [row for row in rows if "ratio_to_echo" in row]
    alone = [row for row in rows if row["what"] == "gate_plan_combine" and row["groups"] == max(bench.groups)]
    summary = {
        "max_ratio_to_echo": max((row["ratio_to_echo"] for row in over_grpc), default=None),
        "without_shared_memory_ratio": {str(row["tokens"]): row["without_shared_memory_ratio"] for row in over_grpc},
        "gate_plan_combine_us_per_token": {
            str(row["tokens"]): round(row["total_us"] / row["tokens"], 3) for row in alone
        },
    }
    machine = {"cores": len(os.sched_getaffinity(0)), "load_at_start": round(load, 2), "torch": torch.__version__}
    return {"machine": machine, "rows": rows, "summary": summary}


def _host_row(bench: DispatchBench, num_tokens: int, num_groups: int) -> dict[str, Any]:
    """The router's own arithmetic: gate, plan with the gathers that it asks for, combine."""
    gate, hidden_TH = make_gate(bench), make_hidden(bench, num_tokens)
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

    gate_us, plan_us, combine_us = medians(bench.seconds / 4, (lambda: gate(hidden_TH), plan_calls, combine))
    return {
        "what": "gate_plan_combine",
        "tokens": num_tokens,
        "groups": num_groups,
        "gate_us": round(gate_us, 1),
        "plan_us": round(plan_us, 1),
        "combine_us": round(combine_us, 1),
        "total_us": round(gate_us + plan_us + combine_us, 1),
    }


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
    table = Table("what", "tokens", "groups", "µs", "echo µs", "ratio", "without shared memory")
    for row in result["rows"]:
        if row["what"] == "copies_per_token":
            continue
        if row["what"] == "gate_plan_combine":
            total = f"{row['total_us']} = {row['gate_us']} + {row['plan_us']} + {row['combine_us']}"
            table.add_row("gate + plan + combine", str(row["tokens"]), str(row["groups"]), total)
        else:
            keys = ("tokens", "peers", "p50_us", "echo_p50_us", "ratio_to_echo", "without_shared_memory_ratio")
            table.add_row(f"dispatch + combine, {row['transport']}", *(str(row.get(key, "")) for key in keys))
    copies = Table("copies per token", "nodes", "per expert", "per group", "per node", "exact", "restrict")
    for row in result["rows"]:
        if row["what"] == "copies_per_token":
            copies.add_row(*map(str, list(row.values())[1:]))
    Console().print(copies, table)
