"""Kubernetes worker groups that follow the autoscaling policies, where mesh.yaml gives us their `replicas`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cluster.config.mesh import WorkerGroupsConfig
from cluster.kubernetes.connect import connect, own_namespace
from cluster.kubernetes.prescale import PodShape, PreScaler
from cluster.kubernetes.ray_objects import RayObjects
from experts.errors import MeshError

log = logging.getLogger(__name__)

Details = Mapping[str, Any]

_STOPPED = ("STOPPED",)


def replicas_wanted(application: Details) -> dict[str, int]:
    """What Serve wants of an application's deployments, running or not, by worker group.

    application: one of Serve's `applications` details
    """
    wanted = {"engine": 0, "experts": 0}
    for name, deployment in application["deployments"].items():
        if name == "engine":
            wanted["engine"] += deployment["target_num_replicas"]
        elif name.startswith("experts-"):
            wanted["experts"] += deployment["target_num_replicas"]
    return wanted


def idle_addresses(application: Details, ray_nodes: Iterable[Details]) -> set[str]:
    """Addresses of live Ray nodes on which none of the application's replicas is, nor starts, nor stops."""
    busy = {
        replica["node_ip"]
        for deployment in application["deployments"].values()
        for replica in deployment["replicas"]
        if str(getattr(replica["state"], "value", replica["state"])) not in _STOPPED
    }
    return {node["NodeManagerAddress"] for node in ray_nodes if node["Alive"]} - busy


class WorkerGroupFollower:
    """A thread that asks for pods as Serve asks for replicas.

    application: Serve's details of our application now. ray_nodes: as `ray.nodes`.
    """

    def __init__(
        self,
        prescaler: PreScaler,
        *,
        application: Callable[[], Details],
        ray_nodes: Callable[[], Iterable[Details]],
        period_s: float = 5.0,
    ) -> None:
        self._prescaler = prescaler
        self._application = application
        self._ray_nodes = ray_nodes
        self._period_s = period_s
        self._complaint = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker-groups", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def step(self) -> None:
        """Look once and write what differs. What Kubernetes refuses goes to the log, once until it changes."""
        application = self._application()
        try:
            done = self._prescaler.follow(replicas_wanted(application), idle_addresses(application, self._ray_nodes()))
        except MeshError as error:
            if str(error) != self._complaint:
                log.warning("worker groups cannot follow: %s", error)
            self._complaint = str(error)
            return
        self._complaint = ""
        for item in done:
            log.info("%s %s: replicas %s -> %s", item.kind, item.name, dict(item.before), dict(item.after))

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            try:
                self.step()
            except Exception:  # Serve's controller restarts now and then; a thread that dies would never tell
                log.exception("worker groups: this step failed, the next is in %g s", self._period_s)


def follow_worker_groups(
    config: WorkerGroupsConfig,
    *,
    application: Callable[[], Details],
    ray_nodes: Callable[[], Iterable[Details]],
) -> WorkerGroupFollower:
    """A follower for this pod's own cluster, not yet started. Raises ConfigError where there is no Kubernetes."""
    api_client = connect()
    sections = {"engine": config.engine, "experts": config.experts}
    prescaler = PreScaler(
        RayObjects(api_client, config.namespace or own_namespace()),
        api_client,
        config.ray_service,
        [PodShape(group=name, **section.model_dump()) for name, section in sections.items()],
        shrink_after_s=config.shrink_after_s,
        clock=time.monotonic,
    )
    return WorkerGroupFollower(prescaler, application=application, ray_nodes=ray_nodes)
