import pytest
from kubernetes import client

from cluster.kubernetes.connect import connect
from cluster.kubernetes.errors import KubernetesError
from cluster.kubernetes.ray_objects import RayObjects
from cluster.kubernetes.scale import scale_patch
from cluster.kubernetes.status import read_status


@pytest.fixture
def add_pod(cluster):
    def add(name, group, *, ready):
        core = client.CoreV1Api(cluster.api_client)
        labels = {"ray.io/cluster": "mesh-abcde", "ray.io/group": group}
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": labels},
            # Nobody schedules it, so no kubelet writes its status.
            "spec": {"schedulerName": "nobody", "containers": [{"name": "ray", "image": "expertmesh:0.1.0-cpu"}]},
        }
        core.create_namespaced_pod(cluster.namespace, body)
        condition = {"type": "Ready", "status": "True" if ready else "False"}
        core.patch_namespaced_pod_status(name, cluster.namespace, {"status": {"conditions": [condition]}})

    return add


def test_what_is_asked_for_beside_what_there_is(cluster, ray_service, add_pod):
    ray_service(engine=1, experts=2)
    add_pod("e-0", "engine", ready=True)
    add_pod("x-0", "experts", ready=True)
    add_pod("x-1", "experts", ready=False)
    found = read_status(connect(cluster.kubeconfig), cluster.namespace, "mesh")
    assert (found.service_status, found.cluster) == ("Running", "mesh-abcde")
    engine, experts = found.groups
    assert (engine.name, engine.pods, engine.ready, engine.settled) == ("engine", 1, 1, True)
    assert (experts.name, experts.pods, experts.ready, experts.settled) == ("experts", 2, 1, False)


def test_a_service_and_a_cluster_that_disagree_are_not_settled(cluster, ray_service):
    ray_service(engine=0, experts=0)
    objects = RayObjects(connect(cluster.kubeconfig), cluster.namespace)
    objects.patch_service("mesh", scale_patch(objects.service("mesh"), {"experts": 2}))
    experts = read_status(connect(cluster.kubeconfig), cluster.namespace, "mesh").groups[1]
    assert (experts.service_replicas, experts.cluster_replicas, experts.settled) == (2, 0, False)


def test_warnings_about_our_objects_also_from_events_without_a_time(cluster, ray_service):
    ray_service()
    core = client.CoreV1Api(cluster.api_client)
    for name, about in (("one", "mesh-abcde"), ("two", "somebody-else")):
        event = {
            "metadata": {"name": name},
            "involvedObject": {"kind": "RayCluster", "name": about, "namespace": cluster.namespace},
            "type": "Warning",
            "reason": "InvalidRayClusterSpec",
            "message": "minReplicas is above maxReplicas",
        }
        core.create_namespaced_event(cluster.namespace, {"apiVersion": "v1", "kind": "Event", **event})
    warnings = read_status(connect(cluster.kubeconfig), cluster.namespace, "mesh").warnings
    assert warnings == ("RayCluster/mesh-abcde: InvalidRayClusterSpec: minReplicas is above maxReplicas",)


def test_before_the_operator_came(cluster, ray_service):
    ray_service(clusters=())
    found = read_status(connect(cluster.kubeconfig), cluster.namespace, "mesh")
    assert found.cluster == ""
    assert not any(group.settled for group in found.groups)


def test_events_that_may_not_be_read_do_not_hide_the_rest(cluster, ray_service, fake):
    ray_service()
    fake.forbidden = {("list", "events")}
    (warning,) = read_status(connect(cluster.kubeconfig), cluster.namespace, "mesh").warnings
    assert "events is forbidden" in warning
    fake.forbidden = {("list", "pods")}
    with pytest.raises(KubernetesError, match="pods is forbidden"):
        read_status(connect(cluster.kubeconfig), cluster.namespace, "mesh")
