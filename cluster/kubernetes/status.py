"""What stands in the cluster, in one look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kubernetes import client

from cluster.kubernetes.errors import readable
from cluster.kubernetes.ray_objects import TIMEOUT_S, Document, RayObjects, cluster_names, worker_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerGroupStatus:
    """Pods of a worker group: what the RayService and the RayCluster ask for, and what there is."""

    name: str
    service_replicas: int
    cluster_replicas: int
    pods: int
    ready: int

    @property
    def settled(self) -> bool:
        return self.service_replicas == self.cluster_replicas == self.pods == self.ready


@dataclass(frozen=True, kw_only=True, slots=True)
class RayServiceStatus:
    """applications: state of each Serve application. warnings: latest first, with the object that they are about."""

    name: str
    service_status: str
    cluster: str
    applications: Mapping[str, str]
    groups: tuple[WorkerGroupStatus, ...]
    warnings: tuple[str, ...]


def read_status(api_client: client.ApiClient, namespace: str, name: str) -> RayServiceStatus:
    """Raises KubernetesError. Where events may not be read, `warnings` says so instead of failing."""
    objects = RayObjects(api_client, namespace)
    service = objects.service(name)
    clusters = cluster_names(service)
    cluster = objects.cluster(clusters[0]) if clusters else None
    core = client.CoreV1Api(api_client)
    pods: list[Document] = []
    if cluster is not None:
        with readable(f"listing pods in {namespace}"):
            answer = core.list_namespaced_pod(
                namespace, label_selector=f"ray.io/cluster={clusters[0]}", _request_timeout=TIMEOUT_S
            )
        pods = [api_client.sanitize_for_serialization(pod) for pod in answer.items]
    status = service.get("status") or {}
    active = status.get("activeServiceStatus") or {}
    return RayServiceStatus(
        name=name,
        service_status=status.get("serviceStatus") or "unknown: the operator has not reported yet",
        cluster=clusters[0] if clusters else "",
        applications={
            application: details.get("status", "")
            for application, details in (active.get("applicationStatuses") or {}).items()
        },
        groups=tuple(_group_status(group, cluster, pods) for group in worker_groups(service)),
        warnings=_warnings(core, namespace, {name, *clusters, *(pod["metadata"]["name"] for pod in pods)}),
    )


def _group_status(group: Document, cluster: Document | None, pods: list[Document]) -> WorkerGroupStatus:
    name = group["groupName"]
    here = [pod for pod in pods if pod["metadata"]["labels"].get("ray.io/group") == name]
    in_cluster = {g["groupName"]: g.get("replicas", 0) for g in worker_groups(cluster)} if cluster else {}
    return WorkerGroupStatus(
        name=name,
        service_replicas=group.get("replicas", 0),
        cluster_replicas=in_cluster.get(name, 0),
        pods=len(here),
        ready=sum(_is_ready(pod) for pod in here),
    )


def _is_ready(pod: Document) -> bool:
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _warnings(core: client.CoreV1Api, namespace: str, about: set[str]) -> tuple[str, ...]:
    # The events.k8s.io client refuses to read events that lack eventTime, and the operator writes such.
    try:
        with readable("reading events"):
            answer = core.list_namespaced_event(namespace, field_selector="type=Warning", _request_timeout=TIMEOUT_S)
    except ValueError as error:
        return (str(error),)
    ours = [event for event in answer.items if event.involved_object.name in about]
    ours.sort(key=lambda event: str(event.last_timestamp or event.metadata.creation_timestamp), reverse=True)
    lines = (f"{e.involved_object.kind}/{e.involved_object.name}: {e.reason}: {e.message}" for e in ours)
    return tuple(dict.fromkeys(lines))[:10]
