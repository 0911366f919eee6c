"""`router.transport: in_process`: the engine's process holds the experts too."""

from __future__ import annotations

from cluster.config.mesh import MeshConfig
from cluster.cores import usable_cores
from cluster.model_files import expert_backend, pick_device
from experts.group import ExpertGroup
from experts.spec import ExpertKey
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.transport.base import Transport
from router_service.transport.in_process import InProcessTransport


def local_experts(checkpoint: Checkpoint, config: MeshConfig) -> tuple[PlacementTable, Transport]:
    """Every group in this process, and the table that says so."""
    model_config = checkpoint.config()
    layout = describe_experts(checkpoint, model_config)
    device = pick_device(config.experts.device)
    count = config.experts.groups
    holders = balanced(layout.experts_per_layer, count, nodes_of_groups=None)
    groups = {}
    for number in range(count):
        backend = expert_backend(config, layout.spec, model_config, device, num_threads=usable_cores())
        group = ExpertGroup(number, layout.spec, backend)
        keys = [ExpertKey(layer, e) for layer, held in holders.items() for e, by in enumerate(held) if number in by]
        group.assign(layout, checkpoint, keys)
        groups[f"local-{number}"] = group
    replicas = tuple(
        GroupReplica(group=number, replica=name, node="local", address="") for number, name in enumerate(groups)
    )
    table = PlacementTable(version=1, num_groups=count, holders=holders, replicas=replicas)
    return table, InProcessTransport(groups)
