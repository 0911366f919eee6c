"""Who says on which machine a group is: the controller, from labels that the group's own pod may not read."""

import asyncio
from types import SimpleNamespace

import pytest
import ray

from cluster import deployments
from experts.errors import ConfigError
from router_service.placement import GroupReplica, balanced

LABELS = {"kubernetes.io/hostname": "m1", "topology.kubernetes.io/rack": "r2", "topology.kubernetes.io/zone": "z"}


@pytest.fixture
def ray_nodes(monkeypatch):
    nodes = [
        {"NodeID": f"id{number}", "Alive": True, "NodeManagerAddress": f"10.0.0.{number}", "Labels": {}}
        for number in range(3)
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    return nodes


def machine_of(ray_node_id):
    """What the controller behind the deployment is told of a group that joins from there."""
    joined = []

    async def join(replica, **_):
        joined.append(replica)

    behind = SimpleNamespace(_controller=SimpleNamespace(join=join))
    replica = GroupReplica(group=0, replica="r", node=ray_node_id, address="10.0.0.1:5000")
    asyncio.run(deployments.ControllerActor.join(behind, replica, device="cpu", resident=frozenset(), known_version=0))
    return joined[0].node


def test_labels_of_ray_name_zone_rack_and_machine(ray_nodes):
    ray_nodes[1]["Labels"] = LABELS
    assert machine_of("id1") == "z/r2/m1"
    assert machine_of("id2") == "10.0.0.2"


def test_labels_of_kubernetes_do_too_and_a_refusal_leaves_the_address(ray_nodes, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.1.0.1")
    monkeypatch.setattr(deployments, "_pod_labels", lambda: {"10.0.0.1": LABELS})
    assert machine_of("id1") == "z/r2/m1"

    def refused():
        raise ConfigError("no rights")

    monkeypatch.setattr(deployments, "_pod_labels", refused)
    assert machine_of("id1") == "10.0.0.1"


def test_neighbouring_experts_go_to_machines_of_one_rack(ray_nodes):
    racks = ("b", "a", "b", "a")
    names = [deployments.read_topology([node_in(rack, n)])["id"].name for n, rack in enumerate(racks)]
    (holders,) = balanced({0: 8}, 4, nodes_of_groups=names).values()
    assert [racks[group] for (group,) in holders] == ["a"] * 4 + ["b"] * 4


def node_in(rack, number):
    labels = {"expertmesh.io/rack": rack}
    return {"NodeID": "id", "Alive": True, "NodeManagerAddress": f"10.0.0.{number}", "Labels": labels}
