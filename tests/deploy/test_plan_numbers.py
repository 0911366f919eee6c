"""Each overlay that says by which plan it was made holds exactly that plan's numbers."""

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import main
from cluster.config.load import parse_mesh

OVERLAYS = Path(__file__).parents[2] / "deploy" / "overlays"
WITHOUT_A_PLAN = {"local"}  # the demo model needs none


def at(document: Any, path: str) -> Any:
    for part in path.strip("/").split("/"):
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def contains(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(k in whole and contains(whole[k], v) for k, v in part.items())
    return bool(whole == part)


@pytest.fixture
def expertmesh(monkeypatch, capsys):
    """Runs the command line in this process; returns what it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["expertmesh", *arguments])
        with contextlib.suppress(SystemExit):
            main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "overlay", sorted(p for p in OVERLAYS.iterdir() if p.name not in WITHOUT_A_PLAN), ids=lambda p: p.name
)
def test_overlay_holds_its_plan(overlay, build, expertmesh):
    (service,) = (o for o in build(overlay) if o["kind"] == "RayService")
    plan = shlex.split(service["metadata"]["annotations"]["expertmesh.io/plan"])
    operations = yaml.safe_load(expertmesh("plan", *plan, "--kustomize"))
    assert operations

    elastic = service["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
    for operation in operations:
        here, planned = at(service, operation["path"]), operation["value"]
        if operation["path"].endswith("/serveConfigV2"):
            ours, theirs = yaml.safe_load(here), yaml.safe_load(planned)
            mesh, planned_mesh = (config["applications"][0]["args"] for config in (ours, theirs))
            parse_mesh(planned_mesh, origin="expertmesh plan --kustomize")
            planned_mesh["model"].pop("source")
            if elastic:
                planned_mesh.pop("autoscaling", None)
            assert contains(mesh, planned_mesh)
        elif operation["path"].endswith("/maxReplicas") and elastic:
            assert here >= planned
        else:
            assert here == planned, operation["path"]


def test_an_elastic_overlay_has_room_for_what_its_policies_may_ask(build):
    for overlay in sorted(OVERLAYS.iterdir()):
        (service,) = (o for o in build(overlay) if o["kind"] == "RayService")
        cluster = service["spec"]["rayClusterConfig"]
        mesh = parse_mesh(yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"], origin="mesh")
        room = {
            group["groupName"]: group["maxReplicas"]
            * int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
            for group in cluster["workerGroupSpecs"]
        }
        if cluster["enableInTreeAutoscaling"]:
            assert mesh.autoscaling.engine
            assert mesh.autoscaling.experts
            assert mesh.autoscaling.engine["max_replicas"] <= room["engine"]
            assert mesh.autoscaling.experts["max_replicas"] * mesh.experts.groups <= room["experts"]
            assert mesh.autoscaling.engine["min_replicas"] == mesh.engine.replicas
