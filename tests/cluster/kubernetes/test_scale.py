import pytest

from cluster.kubernetes.connect import connect
from cluster.kubernetes.errors import KubernetesError
from cluster.kubernetes.ray_objects import RayObjects, worker_groups
from cluster.kubernetes.scale import clear_removed, scale
from experts.errors import ConfigError


@pytest.fixture
def objects(cluster):
    return RayObjects(connect(cluster.kubeconfig), cluster.namespace)


def replicas(document):
    return {group["groupName"]: group["replicas"] for group in worker_groups(document)}


def no_sleep(seconds):
    pass


def test_both_objects_are_written_and_bounds_follow(cluster, ray_service, objects):
    ray_service(engine=1, experts=2)
    done = scale(objects, "mesh", {"experts": 5})
    assert [(item.kind, item.before, item.after) for item in done] == [
        ("RayService", {"experts": 2}, {"experts": 5}),
        ("RayCluster", {"experts": 2}, {"experts": 5}),
    ]
    for document in (cluster.get("RayService", "mesh"), cluster.get("RayCluster", "mesh-abcde")):
        assert replicas(document) == {"engine": 1, "experts": 5}
        assert all(g["minReplicas"] <= g["replicas"] <= g["maxReplicas"] for g in worker_groups(document))
    scale(objects, "mesh", {"experts": 1})
    assert worker_groups(cluster.get("RayCluster", "mesh-abcde"))[1]["minReplicas"] == 1


def test_a_cluster_that_is_to_take_over_is_scaled_too(cluster, ray_service, objects):
    ray_service(clusters=("mesh-old", "mesh-new"))
    scale(objects, "mesh", {"experts": 4})
    assert replicas(cluster.get("RayCluster", "mesh-new"))["experts"] == 4


def test_before_the_operator_has_made_a_cluster_only_the_service_is_written(cluster, ray_service, objects):
    ray_service(clusters=())
    assert [item.kind for item in scale(objects, "mesh", {"engine": 2})] == ["RayService"]


def test_scaling_to_what_stands_there_writes_nothing(cluster, ray_service, objects):
    ray_service()
    before = cluster.get("RayCluster", "mesh-abcde")["metadata"]["resourceVersion"]
    scale(objects, "mesh", {"experts": 2})
    assert cluster.get("RayCluster", "mesh-abcde")["metadata"]["resourceVersion"] == before


class Racing(RayObjects):
    """Between our read and our write, someone else puts the worker groups in another order."""

    races = 1

    def cluster(self, name):
        document = super().cluster(name)
        if self.races:
            self.races -= 1
            others = [*worker_groups(document)][::-1]
            super().patch_cluster(name, [{"op": "replace", "path": "/spec/workerGroupSpecs", "value": others}])
        return document


def test_a_list_that_changed_meanwhile_is_read_again_not_mispatched(cluster, ray_service):
    ray_service(engine=1, experts=2)
    objects = Racing(connect(cluster.kubeconfig), cluster.namespace)
    scale(objects, "mesh", {"experts": 7}, sleep=no_sleep)
    assert replicas(cluster.get("RayCluster", "mesh-abcde")) == {"experts": 7, "engine": 1}


def test_an_unending_race_ends_with_what_is_and_what_is_not_written(cluster, ray_service):
    ray_service()
    objects = Racing(connect(cluster.kubeconfig), cluster.namespace)
    objects.races = 99
    with pytest.raises(KubernetesError, match=r"RayCluster mesh-abcde is not: .*run the same"):
        scale(objects, "mesh", {"experts": 7}, sleep=no_sleep)


def test_named_pods_go_with_the_count_in_one_patch_and_are_cleared_later(cluster, ray_service, objects):
    ray_service(engine=1, experts=3)
    scale(objects, "mesh", {"experts": 2}, remove_pods=["mesh-abcde-experts-worker-x1"])
    group = worker_groups(cluster.get("RayCluster", "mesh-abcde"))[1]
    assert group["replicas"] == 2
    assert group["scaleStrategy"]["workersToDelete"] == ["mesh-abcde-experts-worker-x1"]
    assert "scaleStrategy" not in worker_groups(cluster.get("RayService", "mesh"))[1]
    clear_removed(objects, "mesh")
    assert not worker_groups(cluster.get("RayCluster", "mesh-abcde"))[1].get("scaleStrategy")
    clear_removed(objects, "mesh")


def test_ray_s_autoscaler_is_not_fought(cluster, ray_service, objects):
    ray_service(autoscaling=True)
    with pytest.raises(ConfigError, match="Ray's autoscaler owns `replicas`"):
        scale(objects, "mesh", {"experts": 3})


@pytest.mark.parametrize(
    ("asked", "pods", "message"),
    [
        ({"expert": 3}, [], "no worker group 'expert'; there are engine, experts"),
        ({"experts": -1}, [], "experts=-1: a worker group cannot have fewer than 0 pods"),
        ({"experts": 1, "engine": 1}, ["pod"], "one worker group"),
    ],
)
def test_what_cannot_be_asked(cluster, ray_service, objects, asked, pods, message):
    ray_service()
    with pytest.raises(ConfigError, match=message):
        scale(objects, "mesh", asked, remove_pods=pods)


def test_missing_service_missing_rights_and_outage_are_readable(cluster, ray_service, objects, fake):
    with pytest.raises(KubernetesError, match=r'"mesh" not found .*check --namespace and --name'):
        scale(objects, "mesh", {"experts": 3})
    ray_service()
    fake.forbidden = {("patch", "rayclusters")}
    with pytest.raises(KubernetesError, match=r"RayService mesh is written.*cannot patch resource.*rbac\.yaml"):
        scale(objects, "mesh", {"experts": 3})
    fake.outage = True
    with pytest.raises(KubernetesError, match=r"currently unable .*the API server is in trouble"):
        scale(objects, "mesh", {"experts": 3}, sleep=no_sleep)


def test_a_server_that_is_not_there(tmp_path, cluster, fake):
    gone = tmp_path / "gone"
    gone.write_text(cluster.kubeconfig.read_text().replace("http://127.0.0.1:", "http://127.0.0.1:1#"))
    with pytest.raises(KubernetesError, match="cannot be reached"):
        RayObjects(connect(gone), "mesh-test").service("mesh")


@pytest.mark.parametrize("text", ["not a mapping", "clusters: [", "[1, 2]", "clusters: 3\ncurrent-context: x"])
def test_a_file_that_is_no_kubeconfig(tmp_path, text):
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigError, match="set KUBECONFIG or give --kubeconfig"):
        connect(path)


def test_no_kubeconfig_at_all(tmp_path):
    with pytest.raises(ConfigError, match="set KUBECONFIG or give --kubeconfig"):
        connect(tmp_path / "nowhere")
