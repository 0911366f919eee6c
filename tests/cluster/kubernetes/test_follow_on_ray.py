"""The controller of a running application asks for the pods that its replicas need."""

import tempfile
import time

import pytest
import ray
from ray import serve

from cluster.app import build
from cluster.kubernetes.ray_objects import worker_groups
from cluster.running_app import APPLICATION

pytestmark = [pytest.mark.ray, pytest.mark.slow]
WAIT_S = 120


@pytest.fixture
def real_serve(cluster, fake, ray_service, monkeypatch):
    """Ray and Serve here, whose processes find the API server by KUBECONFIG."""
    ray_service(engine=1, experts=1)
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig))
    # Ray's sockets lie below it, and their paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        ray.init(num_cpus=2, _temp_dir=directory, include_dashboard=False, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        yield
        serve.shutdown()
        ray.shutdown()


def test_replicas_of_a_running_application_become_pods(cluster, fake, real_serve, tiny_checkpoint):
    fake.outage = True
    section = {
        "ray_service": "mesh",
        "namespace": cluster.namespace,
        "engine": {"replicas_per_pod": 1, "max_pods": 2},
        "experts": {"replicas_per_pod": 1, "max_pods": 4},
    }
    document = {
        "model": {"source": str(tiny_checkpoint("mixtral"))},
        "experts": {"groups": 3, "listen_host": "127.0.0.1"},
        "autoscaling": {"worker_groups": section},
    }
    serve.run(build(document), name=APPLICATION, route_prefix=None)
    asked = len(fake.requests)
    until(lambda: len(fake.requests) > asked, "the controller to ask the server that is away")
    fake.outage = False

    def replicas(kind: str, name: str) -> dict[str, int]:
        return {group["groupName"]: group["replicas"] for group in worker_groups(cluster.get(kind, name))}

    wanted = {"engine": 1, "experts": 3}
    until(lambda: replicas("RayCluster", "mesh-abcde") == wanted, "three pods of experts")
    assert replicas("RayService", "mesh") == wanted


def until(condition, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
