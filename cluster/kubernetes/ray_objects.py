"""RayService and RayCluster as the API server holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kubernetes import client

from cluster.kubernetes.errors import readable

GROUP, VERSION = "ray.io", "v1"
FIELD_MANAGER = "expertmesh"
TIMEOUT_S = 10.0

Document = dict[str, Any]
Patch = list[dict[str, Any]]


class RayObjects:
    """Reads and patches the Ray kinds of one namespace. Every method raises KubernetesError."""

    def __init__(self, api_client: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._read = client.CustomObjectsApi(api_client)
        # A list goes out as a merge patch, and is refused, unless the client's default content type says otherwise.
        patching = client.ApiClient(api_client.configuration)
        patching.set_default_header("Content-Type", "application/json-patch+json")
        self._patch = client.CustomObjectsApi(patching)

    def service(self, name: str) -> Document:
        return self._get("rayservices", name)

    def cluster(self, name: str) -> Document:
        return self._get("rayclusters", name)

    def services(self) -> list[Document]:
        with readable(f"listing rayservices in {self.namespace}"):
            answer = self._read.list_namespaced_custom_object(
                GROUP, VERSION, self.namespace, "rayservices", _request_timeout=TIMEOUT_S
            )
        items: list[Document] = answer["items"]
        return items

    def patch_service(self, name: str, patch: Patch) -> Document:
        return self._send("rayservices", name, patch)

    def patch_cluster(self, name: str, patch: Patch) -> Document:
        return self._send("rayclusters", name, patch)

    def _get(self, plural: str, name: str) -> Document:
        with readable(f"reading {plural}/{name} in {self.namespace}"):
            document: Document = self._read.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, plural, name, _request_timeout=TIMEOUT_S
            )
        return document

    def _send(self, plural: str, name: str, patch: Patch) -> Document:
        with readable(f"patching {plural}/{name} in {self.namespace}"):
            document: Document = self._patch.patch_namespaced_custom_object(
                GROUP,
                VERSION,
                self.namespace,
                plural,
                name,
                patch,
                field_manager=FIELD_MANAGER,
                field_validation="Strict",  # else the server drops what it does not know and says nothing
                _request_timeout=TIMEOUT_S,
            )
        return document


def cluster_spec(document: Document) -> Document:
    """The RayClusterSpec of a RayService or a RayCluster."""
    spec: Document = document["spec"]
    inner: Document = spec.get("rayClusterConfig", spec)
    return inner


def worker_groups(document: Document) -> Sequence[Document]:
    """The worker groups of a RayService or a RayCluster, in their order."""
    groups: Sequence[Document] = cluster_spec(document).get("workerGroupSpecs") or []
    return groups


def cluster_names(service: Document) -> tuple[str, ...]:
    """The RayClusters behind a RayService: the one that serves, and the one that is to replace it, if any."""
    status = service.get("status") or {}
    parts = [status.get(key) or {} for key in ("activeServiceStatus", "pendingServiceStatus")]
    return tuple(part["rayClusterName"] for part in parts if part.get("rayClusterName"))
