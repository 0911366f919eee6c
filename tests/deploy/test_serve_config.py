"""serveConfigV2: Serve's own schema accepts unknown keys, so it is closed here; `args` are a mesh.yaml document."""

import copy
import importlib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.autoscale.check import check_autoscaling
from cluster.config.load import parse_mesh


def closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and isinstance(schema["properties"], dict):
        schema["additionalProperties"] = False
    return schema


SCHEMA = closed(ServeDeploySchema.model_json_schema())


def check_serve_config(config: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(config)
    ServeDeploySchema.model_validate(config)
    (application,) = config["applications"]
    assert application["name"] == "expertmesh"
    assert application["route_prefix"].startswith("/")
    module, attribute = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    mesh = parse_mesh(application["args"], origin="serveConfigV2")
    if mesh.autoscaling.engine is not None:
        check_autoscaling(mesh.autoscaling.engine, "autoscaling.engine")
    if mesh.autoscaling.experts is not None:
        check_autoscaling(mesh.autoscaling.experts, "autoscaling.experts", from_zero=False)
    for deployment in application.get("deployments", []):
        check_autoscaling(deployment.get("autoscaling_config", {}), deployment["name"])


@pytest.fixture
def serve_config(ray_service):
    return yaml.safe_load(ray_service["spec"]["serveConfigV2"])


def test_serve_config_says_only_what_serve_and_mesh_yaml_know(serve_config):
    check_serve_config(serve_config)
    assert serve_config["http_options"] == {"host": "0.0.0.0", "port": 8000}


def test_replicas_find_the_pods_that_are_meant_for_them(ray_service, serve_config, kustomization):
    mesh = parse_mesh(serve_config["applications"][0]["args"], origin="serveConfigV2")
    groups = {g["groupName"]: g for g in ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    for name, section, replicas in (
        ("engine", mesh.engine, mesh.engine.replicas),
        ("experts", mesh.experts, mesh.experts.groups),
    ):
        limits = groups[name]["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = int(limits.get("nvidia.com/gpu", 0))
        if gpus:
            assert section.label_selector == groups[name]["labels"]
            assert section.num_gpus == 1
            assert section.device == "cuda"
            assert replicas <= gpus * groups[name]["replicas"]
        else:
            assert section.label_selector == {}, "the text must run where Ray's nodes have no labels"


def test_files_that_the_configuration_names_are_mounted(serve_config, pod_templates):
    mesh = parse_mesh(serve_config["applications"][0]["args"], origin="serveConfigV2")
    if mesh.http.api_keys_file:
        mounts = pod_templates["engine"]["spec"]["containers"][0]["volumeMounts"]
        assert any(mesh.http.api_keys_file.startswith(mount["mountPath"] + "/") for mount in mounts)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("application", []),
        ("http_options.prot", 80),
        ("applications.0.route_prefix", "api"),
        ("applications.0.import_path", "cluster.app:biuld"),
        ("applications.0.args.expert", {}),
        ("applications.0.args.autoscaling", {"experts": {"min_replicas": 3, "max_replicas": 2}}),
        ("applications.0.args.autoscaling", {"experts": {"min_replicas": 0}}),
        ("applications.0.deployments", [{"name": "engine", "num_replica": 2}]),
    ],
)
def test_mistakes_that_serve_would_swallow_are_caught(build, path, value):
    objects = build(Path(__file__).parents[2] / "deploy" / "overlays" / "local")
    (text,) = (o["spec"]["serveConfigV2"] for o in objects if o["kind"] == "RayService")
    config = copy.deepcopy(yaml.safe_load(text))
    *parents, last = path.split(".")
    target: Any = config
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    target[last] = value
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError, AttributeError)):
        check_serve_config(config)
