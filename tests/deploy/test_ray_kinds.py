"""RayServices against KubeRay's CRD, against our own closed list of its fields, and what both miss."""

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from router_service.transport.ray_group import LONG_BYTES

CRDS = Path(__file__).parents[3] / "shared" / "kuberay-crds"
OURS = yaml.safe_load((Path(__file__).parent / "rayservice.schema.yaml").read_text())


def closed(schema: Any) -> Any:
    """The API server drops unknown fields; here they are errors."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def as_stored(value: Any, schema: dict[str, Any]) -> Any:
    """What the API server makes of an object before it validates: nulls go, defaults come."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        extra = schema.get("additionalProperties")
        extra = extra if isinstance(extra, dict) else {}
        value = {k: as_stored(v, properties.get(k, extra)) for k, v in value.items() if v is not None}
        for name, field in properties.items():
            if "default" in field:
                value.setdefault(name, copy.deepcopy(field["default"]))
        return value
    if isinstance(value, list):
        return [as_stored(item, schema.get("items", {})) for item in value]
    return value


@pytest.fixture(scope="session")
def crd_schema() -> dict[str, Any]:
    path = CRDS / "ray.io_rayservices.yaml"
    if not path.is_file():
        pytest.skip(f"KubeRay's CRDs are not at {CRDS}; test_only_known_fields still runs")
    # 18,000 lines: the C loader where PyYAML has it
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(path.read_text(), Loader=loader)["spec"]["versions"]
    (schema,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema = closed(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # checked with every other object's
    return schema


def test_ray_service_matches_the_crd(ray_service, crd_schema):
    jsonschema.Draft202012Validator(crd_schema).validate(as_stored(ray_service, crd_schema))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.rayClusterConfig.enableInTreeAutoscalling", True),
        ("spec.rayClusterConfig.workerGroupSpecs.0.replicas", "two"),
        ("spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0.imagePullpolicy", "Always"),
        ("spec.rayClusterConfig.authOptions.mode", "tokens"),
        ("spec.upgradeStrategy.kind", "None"),
    ],
)
def test_the_crd_check_catches_mistakes(build, crd_schema, path, value):
    objects = build(Path(__file__).parents[2] / "deploy" / "base")
    broken = copy.deepcopy(next(o for o in objects if o["kind"] == "RayService"))
    *parents, last = path.split(".")
    target: Any = broken
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    target[last] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(crd_schema).validate(as_stored(broken, crd_schema))


def test_only_known_fields(ray_service):
    jsonschema.Draft202012Validator(OURS).validate(ray_service)


def test_our_list_of_fields_is_a_part_of_the_crd(crd_schema):
    def differences(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> list[str]:
        found = []
        for name, field in ours.get("properties", {}).items():
            if name not in theirs.get("properties", {}):
                found.append(f"{where}.{name}")
            else:
                found += differences(field, theirs["properties"][name], f"{where}.{name}")
        if "items" in ours:
            found += differences(ours["items"], theirs["items"], f"{where}[]")
        return found

    assert differences(OURS["properties"]["spec"], crd_schema["properties"]["spec"], "spec") == []


def test_worker_groups_can_be_scheduled_as_asked(ray_service):
    cluster = ray_service["spec"]["rayClusterConfig"]
    groups = cluster["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["engine", "experts"]
    for group in groups:
        assert 0 < group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], group["groupName"]
        assert group["labels"]["expertmesh.io/role"] == group["groupName"]
        assert group["template"]["metadata"]["labels"]["expertmesh.io/role"] == group["groupName"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"


def test_replicas_have_one_owner(ray_service, pod_templates):
    cluster = ray_service["spec"]["rayClusterConfig"]
    if cluster["enableInTreeAutoscaling"]:
        assert cluster["autoscalerOptions"]["version"] == "v2"
        assert all(t["spec"].get("restartPolicy", "Never") == "Never" for t in pod_templates.values())
    else:
        assert "autoscalerOptions" not in cluster
        assert all(g["maxReplicas"] == g["replicas"] for g in cluster["workerGroupSpecs"])


def test_every_ray_node_runs_serve_alike(pod_templates):
    for name, template in pod_templates.items():
        (container,) = template["spec"]["containers"]
        of_serve = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"].startswith("RAY_")}
        assert of_serve == {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
            "RAY_max_direct_call_object_size": str(LONG_BYTES),
        }, name
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert "/tmp" in writable, "HAProxy's configuration and sockets lie there"


def test_nothing_needs_twice_the_gpus_to_upgrade(ray_service):
    assert ray_service["spec"]["upgradeStrategy"] == {"type": "None"}
