"""`expertmesh status`: what the controller and Serve know, as a table or as JSON."""

from __future__ import annotations

import json
from typing import Annotated, Any

import ray
import typer
from ray import serve
from rich.console import Console
from rich.table import Column, Table

from cluster.running_app import APPLICATION, connect, engine_replicas, router_services
from experts.errors import ConfigError


def command(
    address: Annotated[str, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to look at")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Groups, nodes, devices, slots, placement version, engines, addresses."""
    connect(address)
    try:
        status = _collect()
    finally:
        ray.shutdown()
    if as_json:
        typer.echo(json.dumps(status, indent=2))
    else:
        _print(status)


def _collect() -> dict[str, Any]:
    applications = serve.status().applications
    if APPLICATION not in applications:
        raise ConfigError("no expertmesh application on this Ray cluster; start one with `expertmesh serve mesh.yaml`")
    controller = serve.get_deployment_handle("controller", APPLICATION)
    status: dict[str, Any] = controller.status.remote().result(timeout_s=30)
    services = router_services()
    return {
        "application": applications[APPLICATION].status.value,
        "address": ray.get_runtime_context().gcs_address,
        "engines": [engine | {"router_service": services.get(engine["replica"])} for engine in engine_replicas()],
        **status,
    }


def _print(status: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"application [bold]{status['application']}[/] · placement version {status['placement_version']} · "
        f"Ray at {status['address']} · replicas lost so far: {status['replicas_lost']}"
    )
    # An address is for copying: never shortened.
    table = Table("what", "replica", "node", "device", Column("address", no_wrap=True), "slots", "state")
    for engine in status["engines"]:
        service = engine["router_service"]
        table.add_row("engine", engine["replica"], engine["node"], "", service or "", "", engine["state"])
    for group in status["groups"]:
        for replica in group["replicas"] or [None]:
            if replica is None:
                table.add_row(f"group {group['group']}", "-", "-", "-", "-", str(group["slots"]), "[red]missing[/]")
                continue
            state = "ready" if replica["ready"] else f"loading {replica['loaded_bytes']}/{replica['total_bytes']} B"
            table.add_row(
                f"group {group['group']}",
                replica["replica"],
                replica["node"],
                replica["device"],
                replica["address"],
                str(group["slots"]),
                state,
            )
    console.print(table)
