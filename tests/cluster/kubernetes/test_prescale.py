from types import SimpleNamespace

import pytest
from kubernetes import client

from cluster.kubernetes.connect import connect
from cluster.kubernetes.prescale import PodShape, PreScaler
from cluster.kubernetes.ray_objects import RayObjects, worker_groups
from cluster.kubernetes.scale import scale
from experts.errors import ConfigError

EXPERTS = PodShape(group="experts", replicas_per_pod=8, min_pods=1, max_pods=6)


@pytest.fixture
def mesh(cluster, fake):
    """A pre-scaler over the fake, with a clock and pods that the test makes and takes."""
    core = client.CoreV1Api(cluster.api_client)
    api_client = connect(cluster.kubeconfig)
    clock = SimpleNamespace(now=0.0)
    prescaler = PreScaler(
        RayObjects(api_client, cluster.namespace),
        api_client,
        "mesh",
        [EXPERTS],
        shrink_after_s=300,
        clock=lambda: clock.now,
    )

    def add_pod(name, address):
        labels = {"ray.io/cluster": "mesh-abcde", "ray.io/group": "experts"}
        spec = {"containers": [{"name": "ray", "image": "expertmesh:0.1.0-cpu"}]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}
        core.create_namespaced_pod(cluster.namespace, body)
        core.patch_namespaced_pod_status(name, cluster.namespace, {"status": {"podIP": address}})

    def group():
        return worker_groups(cluster.get("RayCluster", "mesh-abcde"))[1]

    def delete_pod(name):
        core.delete_namespaced_pod(name, cluster.namespace)

    return SimpleNamespace(clock=clock, follow=prescaler.follow, add_pod=add_pod, delete_pod=delete_pod, group=group)


@pytest.mark.parametrize(("replicas", "pods"), [(0, 1), (1, 1), (8, 1), (9, 2), (16, 2), (17, 3), (999, 6)])
def test_pods_for_replicas(replicas, pods):
    assert EXPERTS.pods_for(replicas) == pods


def test_pods_are_asked_for_as_soon_as_serve_wants_replicas(mesh, ray_service):
    ray_service(engine=1, experts=2)
    assert mesh.follow({"experts": 16}, ()) == []
    assert [item.after for item in mesh.follow({"experts": 25}, ())] == [{"experts": 4}] * 2
    assert mesh.group()["replicas"] == 4
    assert mesh.follow({"experts": 25}, ()) == []


def test_only_idle_pods_go_by_name_after_a_while_and_the_list_is_cleared(mesh, ray_service):
    ray_service(engine=1, experts=3)
    for number in range(3):
        mesh.add_pod(f"x-{number}", f"10.0.0.{number}")
    idle = {"10.0.0.2", "10.9.9.9"}
    assert mesh.follow({"experts": 8}, idle) == []
    mesh.clock.now = 299
    assert mesh.follow({"experts": 8}, idle) == []
    mesh.clock.now = 301
    assert mesh.follow({"experts": 8}, idle)
    assert mesh.group()["replicas"] == 2, "one pod would do, but only one is idle"
    assert mesh.group()["scaleStrategy"]["workersToDelete"] == ["x-2"]

    mesh.clock.now = 9000
    assert mesh.follow({"experts": 8}, {"10.0.0.1"}) == [], "x-2 is still there"
    mesh.delete_pod("x-2")
    mesh.follow({"experts": 16}, ())
    assert not mesh.group().get("scaleStrategy", {}).get("workersToDelete")


def test_a_controller_that_restarted_clears_what_its_predecessor_named(mesh, ray_service, cluster):
    ray_service(engine=1, experts=2)
    mesh.add_pod("x-0", "10.0.0.0")
    scale(RayObjects(connect(cluster.kubeconfig), cluster.namespace), "mesh", {"experts": 1}, remove_pods=["x-0"])
    mesh.follow({"experts": 8}, ())
    assert mesh.group()["scaleStrategy"]["workersToDelete"] == ["x-0"]
    mesh.delete_pod("x-0")
    mesh.follow({"experts": 8}, ())
    assert not mesh.group().get("scaleStrategy", {}).get("workersToDelete")


def test_a_load_that_comes_back_starts_the_wait_anew(mesh, ray_service):
    ray_service(engine=1, experts=2)
    mesh.add_pod("x-0", "10.0.0.0")
    for now, replicas in ((0, 8), (200, 16), (250, 8), (500, 8)):
        mesh.clock.now = now
        assert mesh.follow({"experts": replicas}, {"10.0.0.0"}) == []
    mesh.clock.now = 551
    assert mesh.follow({"experts": 8}, {"10.0.0.0"})


def test_growth_is_not_held_up_by_pods_that_leave(mesh, ray_service):
    ray_service(engine=1, experts=2)
    mesh.add_pod("x-0", "10.0.0.0")
    mesh.follow({"experts": 8}, {"10.0.0.0"})
    mesh.clock.now = 400
    mesh.follow({"experts": 8}, {"10.0.0.0"})
    assert mesh.group()["replicas"] == 1
    mesh.follow({"experts": 20}, ())
    assert mesh.group()["replicas"] == 3


def test_where_ray_s_autoscaler_owns_the_replicas_nothing_is_written(mesh, ray_service):
    ray_service(autoscaling=True, engine=1, experts=1)
    with pytest.raises(ConfigError, match="Ray's autoscaler owns"):
        mesh.follow({"experts": 99}, ())
    assert mesh.group()["replicas"] == 1
