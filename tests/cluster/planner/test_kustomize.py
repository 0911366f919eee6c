from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config.load import parse_mesh
from cluster.planner.deployment import deployment_numbers
from cluster.planner.kustomize import kustomize_patch, mesh_document
from cluster.planner.plan import PlanRequest, make_plan

RequestFor = Callable[..., PlanRequest]
BASE = Path(__file__).parents[3] / "deploy" / "base" / "rayservice.yaml"


def apply(document: Any, operations: list[dict[str, Any]]) -> None:
    """RFC 6902 `test` and `replace`, with the RFC's refusal of a path that is not there."""
    for operation in operations:
        *parents, last = operation["path"].removeprefix("/").split("/")
        at = document
        for key in parents:
            at = at[int(key) if isinstance(at, list) else key]
        key = int(last) if isinstance(at, list) else last
        if operation["op"] == "test":
            assert at[key] == operation["value"]
        else:
            assert operation["op"] == "replace"
            assert at[key] is not None
            at[key] = operation["value"]


def test_the_patch_applies_to_the_base(request_for: RequestFor) -> None:
    if not BASE.is_file():
        pytest.skip(f"no {BASE}")
    numbers = deployment_numbers(make_plan(request_for("deepseek-v3", "h100-80g", 4)))
    text = kustomize_patch(numbers, model_source="deepseek-ai/DeepSeek-V3", header="how it was made")
    assert text.startswith("# how it was made\n")
    service = yaml.safe_load(BASE.read_text())
    apply(service, yaml.safe_load(text))
    engine, experts = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for spec, group in ((engine, numbers.engine), (experts, numbers.experts)):
        assert spec["groupName"] == group.group_name
        assert spec["replicas"] == spec["minReplicas"] == spec["maxReplicas"] == group.replicas
        pod = spec["template"]["spec"]
        limits = pod["containers"][0]["resources"]["limits"]
        assert limits["nvidia.com/gpu"] == str(group.gpus_per_pod)
        assert limits["memory"] == f"{group.memory_gib_per_pod}Gi"
        shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["sizeLimit"] == f"{group.shm_gib_per_pod}Gi"
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    mesh = parse_mesh(serve["applications"][0]["args"], origin="patch")
    assert mesh.experts.groups == numbers.expert_groups
    assert mesh.engine.replicas == numbers.engine_replicas
    assert mesh.engine.kv_cache_memory == numbers.kv_cache_memory


def test_copies_of_groups_become_serve_replicas(request_for: RequestFor) -> None:
    numbers = deployment_numbers(make_plan(request_for("mixtral-8x7b", "h200", 16)))
    assert numbers.group_replicas > 1
    mesh = parse_mesh(mesh_document(numbers, "mistralai/Mixtral-8x7B-v0.1"), origin="plan")
    assert mesh.autoscaling.experts == {
        "min_replicas": numbers.group_replicas,
        "max_replicas": numbers.group_replicas,
    }
