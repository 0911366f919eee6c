"""Worker groups that follow the autoscaling policies: pods are asked for when Serve wants replicas, not when it has
waited for them.

Only where we own `replicas`; where Ray's autoscaler does, `follow` refuses and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from kubernetes import client

from cluster.kubernetes.errors import readable
from cluster.kubernetes.ray_objects import TIMEOUT_S, Document, RayObjects, cluster_names, worker_groups
from cluster.kubernetes.scale import Scaled, clear_removed, refuse_second_owner, scale


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

    def follow(self, wanted: Mapping[str, int], idle_addresses: Collection[str]) -> list[Scaled]:
        """One step towards what Serve wants; returns what was written, nothing where all is well.

        wanted: Serve replicas, running and wished for, by worker group
        idle_addresses: of the Ray nodes without any replica, which are their pods' IPs

        Raises KubernetesError and ConfigError; the next call carries on.
        """
        service = self._objects.service(self._service)
        refuse_second_owner(service)
        clusters = {name: self._objects.cluster(name) for name in cluster_names(service)}
        leaving = self._leaving(clusters)
        done: list[Scaled] = []
        for group, replicas in wanted.items():
            standing = {
                spec["replicas"]
                for document in (service, *clusters.values())
                for spec in worker_groups(document)
                if spec["groupName"] == group
            }
            pods, now = self._shapes[group].pods_for(replicas), max(standing, default=0)
            if pods >= now or group in leaving:
                self._sufficed_since.pop(group, None)
            if pods > now or len(standing) > 1:  # one was written last time, and the other could not be
                done += scale(self._objects, self._service, {group: max(pods, now)})
            elif pods < now and group not in leaving:
                done += self._shrink(clusters, group, now, pods, idle_addresses)
        return done

    def _shrink(
        self, clusters: Mapping[str, Document], group: str, now: int, pods: int, idle_addresses: Collection[str]
    ) -> list[Scaled]:
        since = self._sufficed_since.setdefault(group, self._clock())
        if self._clock() - since < self._shrink_after_s:
            return []
        idle = sorted(name for name, address in self._pods(clusters, group).items() if address in idle_addresses)
        leaving = idle[: now - pods]
        if not leaving:
            return []
        del self._sufficed_since[group]
        return scale(self._objects, self._service, {group: now - len(leaving)}, remove_pods=leaving)

    def _leaving(self, clusters: Mapping[str, Document]) -> set[str]:
        """Groups with pods that were named and are still there.

        The operator never clears the list of pods to delete, and a later pod of that name would be deleted as well:
        once all are gone it is cleared here. It is read from the cluster, so that a restarted controller knows it.
        """
        named = {
            group["groupName"]: names
            for cluster in clusters.values()
            for group in worker_groups(cluster)
            if (names := (group.get("scaleStrategy") or {}).get("workersToDelete"))
        }
        if not any(self._pods(clusters, group).keys() & set(names) for group, names in named.items()):
            if named:
                clear_removed(self._objects, self._service)
            return set()
        return set(named)

    def _pods(self, clusters: Mapping[str, Document], group: str) -> dict[str, str]:
        """Pod names of a worker group to their IPs, empty where a pod has none yet."""
        if not clusters:
            return {}
        selector = f"ray.io/cluster={next(iter(clusters))},ray.io/group={group}"
        with readable(f"listing pods in {self._objects.namespace}"):
            pods = self._core.list_namespaced_pod(
                self._objects.namespace, label_selector=selector, _request_timeout=TIMEOUT_S
            ).items
        return {pod.metadata.name: (pod.status and pod.status.pod_ip) or "" for pod in pods}
