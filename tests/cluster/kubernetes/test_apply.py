import copy

import pytest

from cluster.kubernetes.apply import apply
from cluster.kubernetes.connect import connect
from cluster.kubernetes.errors import KubernetesError
from cluster.kubernetes.ray_objects import RayObjects, worker_groups
from cluster.kubernetes.scale import scale

POD = {"spec": {"containers": [{"name": "ray", "image": "expertmesh:0.1.0-cpu"}]}}
GROUP = {
    "groupName": "experts",
    "replicas": 2,
    "minReplicas": 2,
    "maxReplicas": 2,
    "rayStartParams": {},
    "template": POD,
}
SERVICE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayService",
    "metadata": {"name": "mesh"},
    "spec": {
        "serveConfigV2": "applications: []",
        "rayClusterConfig": {
            "rayVersion": "2.60.0",
            "headGroupSpec": {"rayStartParams": {}, "template": POD},
            "workerGroupSpecs": [GROUP],
        },
    },
}
ACCOUNT = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "mesh"}}


@pytest.fixture
def run(cluster):
    def run_apply(*manifests, **options):
        done = apply(connect(cluster.kubeconfig), copy.deepcopy(manifests), namespace=cluster.namespace, **options)
        return [(item.kind, item.name, item.kept) for item in done]

    return run_apply


@pytest.fixture
def replicas(cluster):
    return lambda: worker_groups(cluster.get("RayService", "mesh"))[0]["replicas"]


def test_creates_and_updates_and_repeats(cluster, run, replicas):
    expected = [("ServiceAccount", "mesh", ()), ("RayService", "mesh", ())]
    assert run(ACCOUNT, SERVICE) == expected
    assert run(ACCOUNT, SERVICE) == expected
    changed = copy.deepcopy(SERVICE)
    changed["spec"]["serveConfigV2"] = "applications: [] # changed"
    run(changed)
    assert cluster.get("RayService", "mesh")["spec"]["serveConfigV2"].endswith("changed")
    assert replicas() == 2


def test_groups_that_were_scaled_stay_scaled_until_told_otherwise(cluster, run, replicas):
    run(SERVICE)
    scale(RayObjects(connect(cluster.kubeconfig), cluster.namespace), "mesh", {"experts": 6})
    assert run(SERVICE) == [("RayService", "mesh", ("experts",))]
    assert replicas() == 6
    assert run(SERVICE, reset_replicas=True) == [("RayService", "mesh", ())]
    assert replicas() == 2


def test_unknown_fields_are_errors(run):
    broken = copy.deepcopy(SERVICE)
    broken["spec"]["rayClusterConfig"]["enableInTreeAutoscalling"] = True
    with pytest.raises(KubernetesError, match=r"applying RayService/mesh: .*enableInTreeAutoscalling"):
        run(broken)


def test_fields_of_another_manager_are_not_taken_unasked(cluster, run, fake):
    run(SERVICE)
    key = ("rayservices", cluster.namespace, "mesh")
    changed = copy.deepcopy(SERVICE)
    changed["spec"]["serveConfigV2"] = "applications: [] # ours"
    fake.owners[key][".spec.serveConfigV2"] = ("argocd", "Update")
    with pytest.raises(
        KubernetesError, match=r'conflict with "argocd".*serveConfigV2; --force takes these fields over'
    ):
        run(changed)
    run(changed, force=True)
    assert cluster.get("RayService", "mesh")["spec"]["serveConfigV2"].endswith("ours")


def test_a_dry_run_keeps_nothing(cluster, run):
    assert run(SERVICE, dry_run=True) == [("RayService", "mesh", ())]
    with pytest.raises(KubernetesError, match="not found"):
        RayObjects(connect(cluster.kubeconfig), cluster.namespace).service("mesh")


def test_a_kind_that_the_cluster_does_not_know(run):
    unknown = {"apiVersion": "example.com/v1", "kind": "Nothing", "metadata": {"name": "x"}}
    with pytest.raises(KubernetesError, match=r"applying Nothing/x: the cluster does not know this kind"):
        run(unknown)


def test_missing_rights_name_the_object_that_was_refused(run, fake):
    fake.forbidden = {("patch", "serviceaccounts")}
    with pytest.raises(KubernetesError, match=r"applying ServiceAccount/mesh: .*forbidden"):
        run(ACCOUNT, SERVICE)
    assert not any(path.endswith("/rayservices/mesh") for _, path in fake.requests)
