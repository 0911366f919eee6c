"""`expertmesh k8s`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.kubernetes.apply import apply
from cluster.kubernetes.connect import connect, own_namespace
from cluster.kubernetes.manifests import read_manifests
from cluster.kubernetes.ray_objects import RayObjects
from cluster.kubernetes.scale import clear_removed, scale
from cluster.kubernetes.status import RayServiceStatus, read_status
from experts.errors import ConfigError

app = typer.Typer(
    help="Status, apply and scale on Kubernetes.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)

Kubeconfig = Annotated[Path | None, typer.Option(help="Else KUBECONFIG, ~/.kube/config, or the pod's own account")]
Context = Annotated[str | None, typer.Option(help="Of the kubeconfig; else its current one")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Else the pod's own, or expertmesh")]
Name = Annotated[str, typer.Option(help="Name of the RayService")]


@app.command()
def status(
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    name: Name = "expertmesh",
    as_json: Annotated[bool, typer.Option("--json", help="Every figure, as JSON")] = False,
) -> None:
    """Service, worker groups, pods and warnings. Exit code 1 while something is not as asked for."""
    found = read_status(connect(kubeconfig, context), namespace or own_namespace(), name)
    settled = found.service_status == "Running" and all(group.settled for group in found.groups)
    if as_json:
        typer.echo(json.dumps({**asdict(found), "settled": settled}, indent=2))
    else:
        _print_status(found)
    raise typer.Exit(0 if settled else 1)


@app.command("apply")
def apply_command(
    manifests: Annotated[str, typer.Argument(help="Directory with a kustomization, a YAML file, or - for stdin")],
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    force: Annotated[bool, typer.Option(help="Take over fields that another manager has set")] = False,
    reset_replicas: Annotated[bool, typer.Option(help="Write the manifest's replicas over those of `scale`")] = False,
    dry_run: Annotated[bool, typer.Option(help="The server checks everything and keeps nothing")] = False,
) -> None:
    """Apply manifests: unknown fields are errors, and worker groups that were scaled stay scaled."""
    documents = read_manifests(manifests)
    client = connect(kubeconfig, context)
    done = apply(
        client,
        documents,
        namespace=namespace or own_namespace(),
        force=force,
        reset_replicas=reset_replicas,
        dry_run=dry_run,
    )
    for item in done:
        where = f" in {item.namespace}" if item.namespace else ""
        kept = f" (kept as scaled: {', '.join(item.kept)}; --reset-replicas undoes that)" if item.kept else ""
        typer.echo(f"{item.kind}/{item.name}{where}: {'would be applied' if dry_run else 'applied'}{kept}")


@app.command("scale")
def scale_command(
    groups: Annotated[list[str], typer.Argument(metavar="GROUP=PODS...", help="Such as experts=3 engine=2")],
    kubeconfig: Kubeconfig = None,
    context: Context = None,
    namespace: Namespace = None,
    name: Name = "expertmesh",
    remove: Annotated[list[str] | None, typer.Option(help="Pod that shall go; may be repeated")] = None,
    clear: Annotated[bool, typer.Option(help="Forget pods named by an earlier --remove: do so once they are gone")] = (
        False
    ),
) -> None:
    """Set the number of pods of worker groups, in the RayService and in the RayCluster that it made."""
    counts = _counts(groups)
    objects = RayObjects(connect(kubeconfig, context), namespace or own_namespace())
    if clear:
        clear_removed(objects, name)
    for item in scale(objects, name, counts, remove_pods=remove or ()):
        for group, after in item.after.items():
            typer.echo(f"{item.kind}/{item.name}: {group} {item.before[group]} -> {after}")


def _counts(groups: list[str]) -> dict[str, int]:
    counts = {}
    for text in groups:
        group, separator, number = text.partition("=")
        if not (group and separator and number.isdecimal()):
            raise ConfigError(f"{text!r}: write GROUP=PODS, such as experts=3")
        counts[group] = int(number)
    return counts


def _print_status(found: RayServiceStatus) -> None:
    console = Console()
    console.print(f"{found.name}: {found.service_status}, cluster {found.cluster or 'none yet'}", markup=False)
    for application, state in found.applications.items():
        console.print(f"  application {application}: {state}", markup=False)
    table = Table("worker group", "asked for", "in the cluster", "pods", "ready")
    for group in found.groups:
        numbers = (group.service_replicas, group.cluster_replicas, group.pods, group.ready)
        table.add_row(group.name, *map(str, numbers))
    console.print(table)
    for warning in found.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
