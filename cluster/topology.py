"""Which machine, rack and zone each Ray node is on: what placement and node-limited routing count as near."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from experts.errors import MeshError

log = logging.getLogger(__name__)

Labels = Mapping[str, str]

# Ours first: whoever sets it means us. Then Kubernetes' and Ray's own, then what clouds call the nearest switch.
NODE_LABELS = ("expertmesh.io/node", "kubernetes.io/hostname")
RACK_LABELS = (
    "expertmesh.io/rack",
    "topology.kubernetes.io/rack",
    "topology.k8s.aws/network-node-layer-3",
    "cloud.google.com/gce-topology-subblock",
)
ZONE_LABELS = ("expertmesh.io/zone", "topology.kubernetes.io/zone", "ray.io/availability-zone")


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where a Ray node runs. Sorted, machines of one rack are neighbours, and racks of one zone.

    zone, rack: empty where no label says
    node:       the machine, the same for several pods on it; the node's address where no label says
    """

    zone: str
    rack: str
    node: str

    @property
    def name(self) -> str:
        """What placement tables call the machine. They sort by it: machines of a rack, and of a zone, stay together."""
        return "/".join(part for part in (self.zone, self.rack, self.node) if part)


def read_topology(
    ray_nodes: Iterable[Mapping[str, Any]],
    labels_by_pod_ip: Callable[[], Mapping[str, Labels]] | None = None,
) -> dict[str, Place]:
    """Place of every live node, by Ray's node id.

    ray_nodes: as `ray.nodes()` returns them
    labels_by_pod_ip: labels of the Kubernetes node under each pod, asked once where there is Kubernetes; Ray's labels
        win over them. Where it raises a MeshError (no rights, API away) the log has one line, and Ray's labels must do.
    """
    nodes = [node for node in ray_nodes if node["Alive"]]
    from_kubernetes: Mapping[str, Labels] = {}
    if labels_by_pod_ip is not None:
        try:
            from_kubernetes = labels_by_pod_ip()
        except MeshError as error:
            log.warning("topology without Kubernetes node labels: %s", error)
    places = {}
    unlabelled = []
    for node in nodes:
        address = node["NodeManagerAddress"]
        labels = {**from_kubernetes.get(address, {}), **(node.get("Labels") or {})}
        name = _first(labels, NODE_LABELS)
        if not name:
            unlabelled.append(address)
        places[node["NodeID"]] = Place(
            zone=_first(labels, ZONE_LABELS), rack=_first(labels, RACK_LABELS), node=name or address
        )
    if unlabelled:
        words = "topology: no node label on %d of %d nodes; their addresses tell them apart"
        log.info(words, len(unlabelled), len(nodes))
    return places


def _first(labels: Labels, names: Iterable[str]) -> str:
    return next((labels[name] for name in names if labels.get(name)), "")
