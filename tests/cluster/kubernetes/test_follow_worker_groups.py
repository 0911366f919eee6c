"""The controller's follower as the controller starts it, the official client, and the API server: a target that changes
reaches the worker groups, whatever the server does meanwhile, and only where mesh.yaml makes us their owner."""

import asyncio
from types import SimpleNamespace

import pytest
import ray
from kubernetes import client
from kubernetes.config import kube_config

from cluster import deployments
from cluster.autoscale.worker_groups import WorkerGroupFollower, follow_worker_groups
from cluster.config.mesh import WorkerGroupsConfig
from cluster.kubernetes.ray_objects import worker_groups

WORKER_GROUPS = {
    "ray_service": "mesh",
    "shrink_after_s": 0,
    "engine": {"replicas_per_pod": 1, "max_pods": 2},
    "experts": {"replicas_per_pod": 2, "max_pods": 4},
}
GROUPS = 4


class Serve:
    """Serve's details of an application whose expert groups want `targets[group]` replicas; `busy` pods have some."""

    def __init__(self):
        self.targets = [1] * GROUPS
        self.engines = 1
        self.pods = ["10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3"]
        self.busy = set(self.pods[:2])

    def application(self):
        running = [{"node_ip": address, "state": "RUNNING"} for address in sorted(self.busy)]
        groups = {
            f"experts-{group}": {"target_num_replicas": target, "replicas": running}
            for group, target in enumerate(self.targets)
        }
        return {"deployments": {"engine": {"target_num_replicas": self.engines, "replicas": []}, **groups}}

    def nodes(self):
        return [{"NodeManagerAddress": address, "Alive": True} for address in self.pods]


@pytest.fixture
def serve(cluster, monkeypatch):
    # The client reads KUBECONFIG when it is imported.
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig))
    return Serve()


@pytest.fixture
def follower(cluster, serve):
    config = WorkerGroupsConfig.model_validate({**WORKER_GROUPS, "namespace": cluster.namespace})
    return follow_worker_groups(config, application=serve.application, ray_nodes=serve.nodes)


@pytest.fixture
def replicas(cluster):
    """Of the RayService and of the RayCluster, which agree."""

    def read():
        both = [
            {group["groupName"]: group["replicas"] for group in worker_groups(cluster.get(kind, name))}
            for kind, name in (("RayService", "mesh"), ("RayCluster", "mesh-abcde"))
        ]
        assert both[0] == both[1]
        return both[0]

    return read


def test_a_target_reaches_the_service_and_its_cluster_both_ways(cluster, ray_service, serve, follower, replicas):
    ray_service(engine=1, experts=2)
    follower.step()
    assert replicas() == {"engine": 1, "experts": 2}

    serve.targets[1] = serve.targets[2] = 2
    serve.engines = 2
    follower.step()
    assert replicas() == {"engine": 2, "experts": 3}

    serve.targets, serve.engines = [1] * GROUPS, 1
    core = client.CoreV1Api(cluster.api_client)
    for number, address in enumerate(serve.pods[:3]):
        labels = {"ray.io/cluster": "mesh-abcde", "ray.io/group": "experts"}
        spec = {"containers": [{"name": "ray", "image": "expertmesh:0.1.0-cpu"}]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"x-{number}", "labels": labels}, "spec": spec}
        core.create_namespaced_pod(cluster.namespace, body)
        core.patch_namespaced_pod_status(f"x-{number}", cluster.namespace, {"status": {"podIP": address}})
    follower.step()
    assert replicas()["experts"] == 2
    group = worker_groups(cluster.get("RayCluster", "mesh-abcde"))[1]
    assert group["scaleStrategy"]["workersToDelete"] == ["x-2"], "the one pod without a replica"


def test_what_somebody_else_writes_is_written_back(cluster, ray_service, follower, replicas):
    ray_service(engine=1, experts=1)
    follower.step()
    assert replicas()["experts"] == 2


def test_where_ray_s_autoscaler_owns_the_replicas_nothing_is_written(ray_service, serve, follower, fake, caplog):
    ray_service(autoscaling=True, engine=1, experts=1)
    fake.requests.clear()
    follower.step()
    follower.step()
    assert {method for method, _ in fake.requests} == {"GET"}
    assert caplog.text.count("Ray's autoscaler owns `replicas`") == 1


def test_an_outage_and_missing_rights_are_survived_and_said_once(ray_service, serve, follower, fake, replicas, caplog):
    ray_service(engine=1, experts=1)
    fake.outage = True
    follower.step()
    follower.step()
    assert caplog.text.count("the API server is in trouble") == 1
    fake.outage, fake.forbidden = False, {("patch", "rayservices")}
    follower.step()
    assert "cannot patch resource" in caplog.text
    fake.forbidden = set()
    follower.step()
    assert replicas()["experts"] == 2


def test_a_half_written_scale_is_finished(cluster, ray_service, follower, fake, replicas):
    ray_service(engine=1, experts=1)
    fake.forbidden = {("patch", "rayclusters")}
    follower.step()
    fake.forbidden = set()
    follower.step()
    assert replicas()["experts"] == 2


def test_a_conflicting_writer_is_read_again(cluster, ray_service, serve, follower, fake, replicas, monkeypatch):
    ray_service(engine=1, experts=1)
    patch, conflicts = fake.patch, iter([True, False, True, False])

    def contended(key, *arguments, **options):
        if next(conflicts, False):  # somebody swaps the worker groups between our read and our patch
            spec = fake.objects[key]["spec"]
            groups = spec.get("rayClusterConfig", spec)
            groups["workerGroupSpecs"] = groups["workerGroupSpecs"][::-1]
        return patch(key, *arguments, **options)

    monkeypatch.setattr(fake, "patch", contended)
    follower.step()
    assert replicas() == {"engine": 1, "experts": 2}


@pytest.mark.parametrize("owned", [True, False])
def test_the_controller_follows_only_where_mesh_yaml_says_so(
    owned, cluster, ray_service, serve, replicas, tiny_checkpoint, monkeypatch
):
    ray_service(engine=1, experts=1)
    started = []
    monkeypatch.setattr(deployments, "application_details", serve.application)
    monkeypatch.setattr(deployments, "log_with_serve", lambda: None)
    monkeypatch.setattr(ray, "nodes", serve.nodes)
    monkeypatch.setattr(WorkerGroupFollower, "start", lambda follower: started.append(follower))
    section = {"worker_groups": {**WORKER_GROUPS, "namespace": cluster.namespace}} if owned else {}
    document = {"model": {"source": str(tiny_checkpoint("mixtral"))}, "autoscaling": section}
    asyncio.run(deployments.ControllerActor.__init__(SimpleNamespace(), document))
    assert len(started) == owned
    for follower in started:
        follower.step()
    assert replicas()["experts"] == (2 if owned else 1)
