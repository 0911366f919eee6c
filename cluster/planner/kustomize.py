"""Writes a plan as the kustomize patch of an overlay under deploy/."""

from __future__ import annotations

from typing import Any

import yaml

from cluster.planner.deployment import DeploymentNumbers, WorkerGroupNumbers

_SPECS = "/spec/rayClusterConfig/workerGroupSpecs"
_EPHEMERAL_STORAGE = "64Gi"


class _Text(str):
    """A string written as a literal block."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")
)


def kustomize_patch(numbers: DeploymentNumbers, *, model_source: str, header: str) -> str:
    """A JSON 6902 patch for the base's RayService: both worker groups, and mesh.yaml in serveConfigV2.

    Operations test that the groups are where the patch expects them. `header` becomes comment lines.
    """
    operations: list[dict[str, Any]] = []
    for index, group in enumerate((numbers.engine, numbers.experts)):
        operations += _worker_group(index, group)
    serve_config = yaml.dump(_serve_config(numbers, model_source), Dumper=_Dumper, sort_keys=False)
    operations.append({"op": "replace", "path": "/spec/serveConfigV2", "value": _Text(serve_config)})
    comment = "".join(f"# {line}\n" for line in header.splitlines())
    return comment + yaml.dump(operations, Dumper=_Dumper, sort_keys=False, width=120)


def mesh_document(numbers: DeploymentNumbers, model_source: str) -> dict[str, Any]:
    """The mesh.yaml of a plan: what differs from the defaults."""
    document: dict[str, Any] = {
        "model": {"source": model_source, "quantization": numbers.quantization},
        "experts": {
            "groups": numbers.expert_groups,
            "num_gpus": 1,
            "num_redundant_experts": numbers.num_redundant_experts,
            "label_selector": {"expertmesh.io/role": "experts"},
        },
        "engine": {
            "replicas": numbers.engine_replicas,
            "num_gpus": 1,
            "max_num_seqs": numbers.max_num_seqs,
            "max_model_len": numbers.max_model_len,
            "kv_cache_memory": numbers.kv_cache_memory,
            "label_selector": {"expertmesh.io/role": "engine"},
        },
    }
    if numbers.group_replicas > 1:
        bounds = {"min_replicas": numbers.group_replicas, "max_replicas": numbers.group_replicas}
        document["autoscaling"] = {"experts": bounds}
    return document


def _worker_group(index: int, group: WorkerGroupNumbers) -> list[dict[str, Any]]:
    at = f"{_SPECS}/{index}"
    resources = {
        "cpu": str(group.cpus_per_pod),
        "memory": f"{group.memory_gib_per_pod}Gi",
        "ephemeral-storage": _EPHEMERAL_STORAGE,
        group.gpu_resource: str(group.gpus_per_pod),
    }
    values: dict[str, Any] = {
        "replicas": group.replicas,
        "minReplicas": group.replicas,
        "maxReplicas": group.replicas,
        "template/spec/containers/0/resources": {"requests": resources, "limits": dict(resources)},
        "template/spec/volumes/1/emptyDir/sizeLimit": f"{group.shm_gib_per_pod}Gi",
    }
    return [
        {"op": "test", "path": f"{at}/groupName", "value": group.group_name},
        *({"op": "replace", "path": f"{at}/{key}", "value": value} for key, value in values.items()),
    ]


def _serve_config(numbers: DeploymentNumbers, model_source: str) -> dict[str, Any]:
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": "expertmesh",
                "route_prefix": "/",
                "import_path": "cluster.app:build",
                "args": mesh_document(numbers, model_source),
            }
        ],
    }
