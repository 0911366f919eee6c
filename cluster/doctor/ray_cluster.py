"""Is Ray here, is the cluster there, and has it what mesh.yaml asks for?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import metadata, util

from cluster.config.mesh import MeshConfig
from cluster.doctor.demand import demand
from cluster.doctor.finding import Finding
from cluster.reachable import unreachable
from experts.errors import ConfigError


def check_ray(config: MeshConfig | None, address: str | None) -> Iterator[Finding]:
    """Ray itself, and the cluster at `address` where one is given."""
    if util.find_spec("ray") is None:
        yield Finding(check="ray", status="fail", found="Ray is not installed", todo='pip install "ray[serve]"')
        return
    yield Finding(check="ray", status="ok", found=f"Ray {metadata.version('ray')}")
    if address:
        yield from _check_cluster(config, address)
    elif config is not None:
        cores = os.cpu_count() or 1
        needed = demand(config, has_gpu=False).cpus
        short = needed > cores
        yield Finding(
            check="ray",
            status="fail" if short else "ok",
            found=f"{needed:g} of {cores} CPUs are asked for",
            todo="lower num_cpus of engine and experts, or the number of groups" if short else "",
        )


def _check_cluster(config: MeshConfig | None, address: str) -> Iterator[Finding]:
    if reason := unreachable(address):
        yield Finding(
            check="cluster",
            status="fail",
            found=f"{address}: {reason}",
            todo="start Ray there (ray start --head), open the port, or correct --address / RAY_ADDRESS",
        )
        return
    # Ray comes with this import: late, so that the other checks answer where it is missing.
    import ray

    from cluster.running_app import connect

    try:
        connect(address)
    except ConfigError as error:
        yield Finding(
            check="cluster",
            status="fail",
            found=str(error),
            todo="use the cluster's Ray and Python versions here, and its token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH)",
        )
        return
    try:
        resources = ray.cluster_resources()
        alive = [node for node in ray.nodes() if node["Alive"]]
        yield Finding(check="cluster", status="ok", found=f"{address}: {len(alive)} nodes")
        if config is not None:
            yield from _check_resources(config, resources)
    finally:
        ray.shutdown()


def _check_resources(config: MeshConfig, resources: dict[str, float]) -> Iterator[Finding]:
    gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 0.0)
    needed = demand(config, has_gpu=gpus > 0)
    for name, asked, there in (("GPUs", needed.gpus, gpus), ("CPUs", needed.cpus, cpus)):
        short = asked > there
        yield Finding(
            check="cluster",
            status="fail" if short else "ok",
            found=f"{asked:g} of the cluster's {there:g} {name} are asked for",
            todo="add nodes, lower experts.groups or engine.replicas, or set num_gpus" if short else "",
        )
