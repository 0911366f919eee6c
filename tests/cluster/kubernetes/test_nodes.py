import pytest
from kubernetes import client

from cluster.kubernetes.connect import connect
from cluster.kubernetes.errors import KubernetesError
from cluster.kubernetes.nodes import labels_by_pod_ip


@pytest.fixture
def two_pods(cluster, fake):
    """One pod that runs on a labelled node, one that waits for a node."""
    core = client.CoreV1Api(cluster.api_client)
    labels = {"topology.kubernetes.io/zone": "z1"}
    core.create_node({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "gpu-1", "labels": labels}})
    for name, spec in (("runs", {"nodeName": "gpu-1"}), ("waits", {})):
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "expertmesh"}},
            "spec": {"containers": [{"name": "ray", "image": "expertmesh:0.1.0-cpu"}], **spec},
        }
        core.create_namespaced_pod(cluster.namespace, body)
    core.patch_namespaced_pod_status("runs", cluster.namespace, {"status": {"podIP": "10.0.0.7"}})


def test_labels_of_the_node_under_each_pod_that_runs(cluster, two_pods):
    found = labels_by_pod_ip(connect(cluster.kubeconfig), cluster.namespace)
    assert found == {"10.0.0.7": {"kubernetes.io/hostname": "gpu-1", "topology.kubernetes.io/zone": "z1"}}


def test_missing_rights_are_an_error_with_its_cure(cluster, two_pods, fake):
    fake.forbidden = {("list", "nodes")}
    with pytest.raises(KubernetesError, match=r"nodes is forbidden.*rbac\.yaml"):
        labels_by_pod_ip(connect(cluster.kubeconfig), cluster.namespace)
