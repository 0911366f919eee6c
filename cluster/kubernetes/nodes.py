"""Labels of the Kubernetes nodes under our pods."""

from __future__ import annotations

from collections.abc import Mapping

from kubernetes import client

from cluster.kubernetes.errors import readable
from cluster.kubernetes.ray_objects import TIMEOUT_S

PODS = "app.kubernetes.io/part-of=expertmesh"


def labels_by_pod_ip(api_client: client.ApiClient, namespace: str) -> dict[str, Mapping[str, str]]:
    """For every pod of the mesh that runs: its IP, which is its Ray node's address, to the labels of its node.

    Raises KubernetesError.
    """
    core = client.CoreV1Api(api_client)
    with readable("listing nodes"):
        nodes = core.list_node(_request_timeout=TIMEOUT_S).items
    with readable(f"listing pods in {namespace}"):
        pods = core.list_namespaced_pod(namespace, label_selector=PODS, _request_timeout=TIMEOUT_S).items
    # The name does where a node carries no hostname label.
    labels = {n.metadata.name: {"kubernetes.io/hostname": n.metadata.name, **(n.metadata.labels or {})} for n in nodes}
    return {
        pod.status.pod_ip: labels[pod.spec.node_name]
        for pod in pods
        if pod.status and pod.status.pod_ip and pod.spec.node_name in labels
    }
