"""`expertmesh doctor`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.config.mesh import MeshConfig
from cluster.doctor.configuration import check_configuration
from cluster.doctor.finding import Finding
from cluster.doctor.gpus import check_gpus
from cluster.doctor.memory import check_memory
from cluster.doctor.model import check_model_files
from cluster.doctor.packages import check_packages
from cluster.doctor.ports import check_ports
from cluster.doctor.ray_cluster import check_ray
from cluster.doctor.settings import check_settings
from cluster.doctor.shared_memory import check_shared_memory
from cluster.doctor.triton import check_triton

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def command(
    mesh: Annotated[Path | None, typer.Argument(help="mesh.yaml; without it only the machine is checked")] = None,
    address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to be served on; without one, this machine")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON")] = False,
) -> None:
    """Check this machine, a mesh.yaml and the cluster before serving.

    Exit codes: 0 serving can start, 1 something would stop it.
    """
    findings = diagnose(mesh, address)
    can_serve = not any(finding.status == "fail" for finding in findings)
    if as_json:
        document = {"can_serve": can_serve, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(document, indent=2))
    else:
        _print(findings, can_serve, Console())
    raise typer.Exit(0 if can_serve else 1)


def diagnose(mesh: Path | None, address: str | None) -> list[Finding]:
    """Every finding, in the order in which things are needed. A check that fails by itself is a finding."""
    config: MeshConfig | None = None
    findings = _findings("packages", check_packages)
    if mesh is not None:
        read, config = check_configuration(mesh)
        findings += read
    findings += _findings("gpus", lambda: check_gpus(config, here=address is None))
    findings += _findings("triton", check_triton)
    findings += _findings("shared memory", check_shared_memory)
    if config is not None:
        known = config
        findings += _findings("model", lambda: check_model_files(known))
        findings += _findings("settings", lambda: check_settings(known, here=address is None))
        if address is None:
            findings += _findings("ports", lambda: check_ports(known))
            findings += _findings("memory", lambda: check_memory(known))
    findings += _findings("ray", lambda: check_ray(config, address))
    return findings


def _findings(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return [*check()]
    except Exception as error:
        # A broken driver or half an installation fails in ways of its own: the other checks still have to answer.
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Finding(check=name, status="fail", found=words, todo="repair what the message names, then run again")]


def _print(findings: list[Finding], can_serve: bool, console: Console) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for finding in findings:
        found = escape(finding.found) + (f"\n[dim]-> {escape(finding.todo)}[/dim]" if finding.todo else "")
        table.add_row(f"[{_COLOURS[finding.status]}]{finding.status}[/]", finding.check, found)
    console.print(table)
    console.print("Serving can start." if can_serve else "Serving cannot start: see the lines that say fail.")
