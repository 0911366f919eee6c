import logging
import tempfile

import pytest
import ray

from cluster.topology import Place, read_topology
from experts.errors import MeshError


def node(identity, address, alive=True, **labels):
    return {"NodeID": identity, "NodeManagerAddress": address, "Alive": alive, "Labels": labels}


def test_labels_of_ray_win_over_those_of_kubernetes():
    nodes = [
        {**node("a", "10.0.0.1"), "Labels": {"expertmesh.io/rack": "r9", "ray.io/node-id": "a"}},
        node("b", "10.0.0.2"),
    ]
    kubernetes = {
        "10.0.0.1": {"kubernetes.io/hostname": "gpu-1", "topology.kubernetes.io/rack": "r1"},
        "10.0.0.2": {"kubernetes.io/hostname": "gpu-1", "topology.kubernetes.io/zone": "z1"},
    }
    assert read_topology(nodes, lambda: kubernetes) == {
        "a": Place(zone="", rack="r9", node="gpu-1"),
        "b": Place(zone="z1", rack="", node="gpu-1"),
    }


def test_sorted_places_put_neighbours_together():
    places = [Place("z2", "r1", "d"), Place("z1", "r2", "c"), Place("z1", "r1", "b"), Place("z1", "r2", "a")]
    assert [place.node for place in sorted(places)] == ["b", "a", "c", "d"]


def test_without_labels_addresses_tell_nodes_apart_and_the_log_says_so_once(caplog):
    caplog.set_level(logging.INFO)
    nodes = [node("a", "10.0.0.1"), node("b", "10.0.0.2"), node("gone", "10.0.0.3", alive=False)]
    places = read_topology(nodes)
    assert {key: place.node for key, place in places.items()} == {"a": "10.0.0.1", "b": "10.0.0.2"}
    (record,) = caplog.records
    assert "no node label on 2 of 2 nodes" in record.getMessage()


def test_kubernetes_that_refuses_is_one_line_in_the_log(caplog):
    def refuse():
        raise MeshError("nodes is forbidden")

    places = read_topology([{**node("a", "10.0.0.1"), "Labels": {"expertmesh.io/node": "m1"}}], refuse)
    assert places["a"].node == "m1"
    assert [record.getMessage() for record in caplog.records] == [
        "topology without Kubernetes node labels: nodes is forbidden"
    ]


@pytest.mark.ray
def test_what_ray_reports_can_be_read():
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        check_what_ray_reports(directory)


def check_what_ray_reports(directory):
    ray.init(
        num_cpus=1,
        _temp_dir=directory,
        include_dashboard=False,
        labels={"expertmesh.io/rack": "r1", "expertmesh.io/node": "m1"},
        log_to_driver=False,
    )
    try:
        (place,) = read_topology(ray.nodes()).values()
        assert place == Place(zone="", rack="r1", node="m1")
    finally:
        ray.shutdown()
