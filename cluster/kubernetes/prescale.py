"""Worker groups that follow the autoscaling policies: pods are asked for when Serve wants replicas, not when it has
waited for them.

Only where we own `replicas`; where Ray's autoscaler does, `scale` refuses and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from kubernetes import client

from cluster.kubernetes.errors import readable
from cluster.kubernetes.ray_objects import TIMEOUT_S, RayObjects, cluster_names, worker_groups
from cluster.kubernetes.scale import Scaled, clear_removed, scale


@dataclass(frozen=True, kw_only=True, slots=True)
class PodShape:
    """A worker group as the pre-scaler sees it: how many Serve replicas one pod takes, and its bounds in pods."""

    group: str
    replicas_per_pod: int
    min_pods: int
    max_pods: int

    def pods_for(self, replicas: int) -> int:
        return min(self.max_pods, max(self.min_pods, math.ceil(replicas / self.replicas_per_pod)))


class PreScaler:
    """Call `follow` now and then with what Serve wants.

    Growth is asked for at once. Shrinking waits until fewer pods have sufficed for `shrink_after_s` seconds, and only
    takes pods on which nothing runs, by name: left to itself the operator picks any, and one that holds experts costs a
    reload.
    """

    def __init__(
        self,
        objects: RayObjects,
        api_client: client.ApiClient,
        service: str,
        shapes: Collection[PodShape],
        *,
        shrink_after_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._objects = objects
        self._core = client.CoreV1Api(api_client)
        self._service = service
        self._shapes = {shape.group: shape for shape in shapes}
        self._shrink_after_s = shrink_after_s
        self._clock = clock
        self._sufficed_since: dict[str, float] = {}
        self._leaving: dict[str, list[str]] = {}

    def follow(self, wanted: Mapping[str, int], idle_addresses: Collection[str]) -> list[Scaled]:
        """One step towards what Serve wants; returns what was written, nothing where all is well.

        wanted: Serve replicas, running and wished for, by worker group
        idle_addresses: of the Ray nodes without any replica, which are their pods' IPs

        Raises KubernetesError and ConfigError; the next call carries on.
        """
        self._forget_the_gone()
        standing = {
            group["groupName"]: group["replicas"] for group in worker_groups(self._objects.service(self._service))
        }
        done: list[Scaled] = []
        for group, replicas in wanted.items():
            shape, now = self._shapes[group], standing[group]
            pods = shape.pods_for(replicas)
            if pods >= now or group in self._leaving:
                self._sufficed_since.pop(group, None)
            if pods > now:
                done += scale(self._objects, self._service, {group: pods})
            elif pods < now and group not in self._leaving:
                done += self._shrink(group, now, pods, idle_addresses)
        return done

    def _shrink(self, group: str, now: int, pods: int, idle_addresses: Collection[str]) -> list[Scaled]:
        since = self._sufficed_since.setdefault(group, self._clock())
        if self._clock() - since < self._shrink_after_s:
            return []
        idle = sorted(name for name, address in self._pods(group).items() if address in idle_addresses)
        leaving = idle[: now - pods]
        if not leaving:
            return []
        del self._sufficed_since[group]
        self._leaving[group] = leaving
        return scale(self._objects, self._service, {group: now - len(leaving)}, remove_pods=leaving)

    def _forget_the_gone(self) -> None:
        """The operator never clears the list of pods to delete; a later pod of that name would be deleted as well."""
        here = {name for group in self._leaving for name in self._pods(group)}
        if self._leaving and not here & {name for names in self._leaving.values() for name in names}:
            clear_removed(self._objects, self._service)
            self._leaving = {}

    def _pods(self, group: str) -> dict[str, str]:
        """Pod names of a worker group to their IPs, empty where a pod has none yet."""
        clusters = cluster_names(self._objects.service(self._service))
        if not clusters:
            return {}
        selector = f"ray.io/cluster={clusters[0]},ray.io/group={group}"
        with readable(f"listing pods in {self._objects.namespace}"):
            pods = self._core.list_namespaced_pod(
                self._objects.namespace, label_selector=selector, _request_timeout=TIMEOUT_S
            ).items
        return {pod.metadata.name: (pod.status and pod.status.pod_ip) or "" for pod in pods}
