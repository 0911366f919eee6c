"""`expertmesh bench bytes`: what a token costs on the network, counted on the interfaces of hosts.

Every node is a network namespace with its expert groups as processes of their own, the router's engine is another;
gates are DeepSeek-V3's and Mixtral's with random weights, which spread tokens as evenly as can be: a trained gate
touches fewer nodes. The groups do no arithmetic, the wire is the real one. Counted are whole Ethernet frames of 1500
bytes at most, acknowledgements included; nothing is taken off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from cluster.bench.dispatch_copies import PATTERNS
from cluster.bench.dispatch_peers import grpc_peers
from cluster.bench.hosts import network
from cluster.bench.node_bytes_router import Job
from cluster.bench.processes import interruptible, log_tail, stop_tree
from experts.errors import ConfigError, MeshError
from router_service.transport.wire_dtype import WireDtype


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeBytesBench:
    """What to run: every pattern with every wire dtype on every number of nodes.

    tokens: of a batch; batches: that are counted, after a first one that opens the connections
    """

    patterns: tuple[str, ...] = tuple(PATTERNS)
    nodes: tuple[int, ...] = (2, 4, 8)
    wire_dtypes: tuple[WireDtype, ...] = ("bf16",)
    tokens: int = 256
    batches: int = 4

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if pattern not in PATTERNS:
                raise ConfigError(f"--pattern {pattern} is not one of {', '.join(PATTERNS)}")
        for wire_dtype in self.wire_dtypes:
            if wire_dtype not in get_args(WireDtype):
                raise ConfigError(f"--wire-dtype {wire_dtype} is not one of {', '.join(get_args(WireDtype))}")
        if min(self.nodes, default=0) < 2 or max(self.nodes, default=0) > 8:
            raise ConfigError("--nodes takes numbers from 2 to 8")
        if self.tokens < 1 or self.batches < 1:
            raise ConfigError("--tokens and --batches take numbers from 1")


def run(bench: NodeBytesBench, *, console: Console | None = None) -> dict[str, Any]:
    """rows: pattern, wire_dtype, nodes, mode, redundant_experts, limit (the router's max_nodes_per_token),
    nodes_touched (by a token, mean), bytes_out and bytes_back (of a token and layer, on the nodes' interfaces),
    ratio_out and ratio_back (of those to nodes_touched * hidden size * bytes of a value on the wire),
    engine_bytes_out and engine_bytes_back (the same on the engine's interface).

    Modes: `per expert` sends a row for each (token, expert), the baseline; `per node`, `exact` and `restrict` are the
    router's. summary: max_ratio, the largest of either ratio where not per expert.

    Raises ConfigError where there is no making network namespaces.
    """
    console = console or Console(quiet=True)
    rows: list[dict[str, Any]] = []
    with closing(_rows(bench)) as measured:
        for row in measured:
            rows.append(row)
            console.print(f"{row['pattern']} {row['wire_dtype']}, {row['nodes']} nodes, {row['mode']}", highlight=False)
    ratios = [row[key] for row in rows if row["mode"] != "per expert" for key in ("ratio_out", "ratio_back")]
    return {"rows": rows, "summary": {"max_ratio": max(ratios)}}


def _rows(bench: NodeBytesBench) -> Generator[dict[str, Any]]:
    per_node = max(PATTERNS[name].groups_per_node for name in bench.patterns)
    with network(1 + max(bench.nodes)) as (engine, *nodes), tempfile.TemporaryDirectory() as directory:
        homes = [(host.command(), host.address) for host in nodes for _ in range(per_node)]
        with grpc_peers(homes) as peers:
            addresses = [group for group, _ in peers]
            job = Job(
                engine=engine,
                nodes=nodes,
                addresses=[addresses[first : first + per_node] for first in range(0, len(addresses), per_node)],
                patterns=bench.patterns,
                node_counts=bench.nodes,
                wire_dtypes=bench.wire_dtypes,
                tokens=bench.tokens,
                batches=bench.batches,
            )
            job_file, log = Path(directory, "job.json"), Path(directory, "log")
            job_file.write_text(json.dumps(asdict(job)))
            with log.open("w") as errors:
                router = subprocess.Popen(
                    engine.command(sys.executable, "-m", "cluster.bench.node_bytes_router", str(job_file)),
                    env=os.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                )
            try:
                assert router.stdout is not None
                yield from map(json.loads, router.stdout)
                if router.wait() != 0:
                    raise MeshError(f"the router stopped:\n{log_tail(log)}")
            finally:
                stop_tree(router)


def command(
    pattern: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(PATTERNS)}; repeatable.")] = None,
    nodes: Annotated[list[int] | None, typer.Option(help="Number of nodes, 2 to 8; repeatable.")] = None,
    wire_dtype: Annotated[list[str] | None, typer.Option(help="model, bf16 or fp8; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Batch size.")] = 256,
    batches: Annotated[int, typer.Option(help="Batches of each row.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Bytes of a token and layer on the network, for each way of dispatching. Needs root and iproute2."""
    console, defaults = Console(stderr=True), NodeBytesBench()
    try:
        with interruptible():
            bench = NodeBytesBench(
                patterns=tuple(pattern or defaults.patterns),
                nodes=tuple(nodes or defaults.nodes),
                wire_dtypes=tuple(wire_dtype or defaults.wire_dtypes),  # type: ignore[arg-type]
                tokens=tokens,
                batches=batches,
            )
            result = run(bench, console=console)
    except KeyboardInterrupt as error:
        console.print("interrupted; every process and namespace is gone")
        raise typer.Exit(130) from error
    if as_json:
        print(json.dumps(result, indent=2))
        return
    output = Console()
    for each in dict.fromkeys(row["wire_dtype"] for row in result["rows"]):
        output.print(_table([row for row in result["rows"] if row["wire_dtype"] == each], f"wire dtype {each}"))
    output.print(f"largest ratio but per expert: {result['summary']['max_ratio']}")


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table("pattern", "nodes", "mode", "touched", "out", "back", "ratio", "ratio", title=title)
    for row in rows:
        mode = f"{row['mode']} {row['limit']}" if row["mode"] == "restrict" else row["mode"]
        table.add_row(
            row["pattern"],
            str(row["nodes"]),
            mode,
            f"{row['nodes_touched']:.2f}",
            str(row["bytes_out"]),
            str(row["bytes_back"]),
            f"{row['ratio_out']:.3f}",
            f"{row['ratio_back']:.3f}",
        )
    return table
