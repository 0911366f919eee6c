"""Composition root: mesh.yaml in, Ray Serve application out.

`import_path: cluster.app:build` with the mesh.yaml document as `args` serves it from `serve run`, `serve deploy` and a
RayService; `serve run cluster.app:build mesh=mesh.yaml` reads it from a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.serve import Application

from cluster.autoscale.check import check_sections
from cluster.config.load import load_mesh, parse_mesh
from cluster.config.mesh import EngineConfig, ExpertsConfig
from cluster.deployments import CONTROLLER, ENGINE, GROUP


def build(args: dict[str, Any]) -> Application:
    """The application for one mesh.yaml document: a controller, a deployment per expert group, and the engine.

    Raises ConfigError.
    """
    config = load_mesh(Path(args["mesh"])) if set(args) == {"mesh"} else parse_mesh(args, origin="mesh")
    check_sections(config.autoscaling)
    document = config.model_dump(mode="json")
    engine = ENGINE.options(
        ray_actor_options=_actor_options(config.engine),
        **_scaling(config.autoscaling.engine, config.engine.replicas),
    )
    if config.router.transport == "in_process":
        return engine.bind(document, None)
    # On the engines' nodes: expert pods may hold no token for the Kubernetes API.
    labels = {"label_selector": config.engine.label_selector} if config.engine.label_selector else {}
    controller = CONTROLLER.options(ray_actor_options={"num_cpus": 0, **labels}).bind(document)
    groups = [
        GROUP.options(
            name=f"experts-{group}",
            ray_actor_options=_actor_options(config.experts),
            **_scaling(config.autoscaling.experts, 1),
        ).bind(group, document, controller)
        for group in range(config.experts.groups)
    ]
    return engine.bind(document, controller, *groups)


def _scaling(autoscaling: dict[str, Any] | None, replicas: int) -> dict[str, Any]:
    return {"autoscaling_config": autoscaling} if autoscaling else {"num_replicas": replicas}


def _actor_options(section: EngineConfig | ExpertsConfig) -> dict[str, Any]:
    gpus = section.num_gpus
    if gpus == "auto":
        has_gpu = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
        gpus = 1.0 if section.device == "cuda" or (section.device == "auto" and has_gpu) else 0.0
    options: dict[str, Any] = {"num_cpus": section.num_cpus, "num_gpus": gpus}
    if section.resources:
        options["resources"] = section.resources
    if section.label_selector:
        options["label_selector"] = section.label_selector
    return options
