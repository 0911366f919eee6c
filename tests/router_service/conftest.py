import dataclasses
import time

import pytest
import torch

from experts.errors import ExpertNotResident, RequestError
from experts.server import ExpertServer
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.transport.in_process import InProcessTransport


@pytest.fixture
def wait_until():
    """Waits for a condition: what the far end of a socket brings about comes a little later."""

    def wait(condition):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    return wait


class TinyExperts:
    """Every expert of one layer as a tanh of its own matrix, and the dense reference over all of them."""

    def __init__(self, num_experts, hidden_size):
        generator = torch.Generator().manual_seed(7)
        self.weight_EHH = torch.randn(num_experts, hidden_size, hidden_size, generator=generator) / hidden_size**0.5

    def expert(self, expert, hidden_TH):
        # A thread's first product may take more of torch's threads than the next: in float64 nobody sees it.
        return torch.tanh(hidden_TH.double() @ self.weight_EHH[expert].double()).float()

    def reference(self, hidden_TH, expert_ids_TK, weights_TK):
        """Token by token in float64: nothing in common with how the router does it."""
        out_TH = torch.zeros(hidden_TH.shape, dtype=torch.float64)
        for token, (ids, weights) in enumerate(zip(expert_ids_TK.tolist(), weights_TK.tolist(), strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                if expert >= 0:
                    out_TH[token] += weight * torch.tanh(hidden_TH[token].double() @ self.weight_EHH[expert].double())
        return out_TH


class TinyGroup:
    """What a group does with a call, written row by row."""

    def __init__(self, experts, held):
        self.experts, self.held, self.calls = experts, set(held), []

    def answer(self, request):
        return None

    def forward(self, call):
        self.calls.append(call)
        width = self.experts.weight_EHH.shape[1]
        if call.hidden_TH.shape[1] != width:
            raise RequestError(
                f"hidden.shape: {call.hidden_TH.shape[1]} wide, these experts take {width}", "hidden.shape"
            )
        partial_TH = torch.zeros(call.hidden_TH.shape, dtype=torch.float32)
        offsets = call.offsets_S1.tolist()
        assert offsets[0] == 0
        assert offsets[-1] == len(call.token_rows_R) == len(call.weights_R)
        for s, expert in enumerate(call.expert_ids_S.tolist()):
            if (call.layer, expert) not in self.held:
                raise ExpertNotResident(f"layer {call.layer} expert {expert} is not here", "expert_ids")
            rows = call.token_rows_R[offsets[s] : offsets[s + 1]].long()
            weights = call.weights_R[offsets[s] : offsets[s + 1], None]
            partial_TH[rows] += weights * self.experts.expert(expert, call.hidden_TH[rows])
        return partial_TH


class Mesh:
    """Groups of TinyGroup in this process, with the table that describes them."""

    def __init__(self, num_experts=16, hidden_size=8, num_groups=4, redundant=0, nodes=None, layers=(0,)):
        self.experts = TinyExperts(num_experts, hidden_size)
        self.nodes = nodes or ["n0"] * num_groups
        holders = balanced(
            dict.fromkeys(layers, num_experts),
            num_groups,
            nodes_of_groups=self.nodes,
            num_redundant_experts=redundant,
        )
        self.groups = {}
        self.table = PlacementTable(version=1, num_groups=num_groups, holders=holders, replicas=())
        for group in range(num_groups):
            self.start(group)
        self.transport = InProcessTransport(self.groups)

    def start(self, group):
        """A fresh replica of `group`, in the newest table instead of the ones it had."""
        name = f"g{group}-{len(self.groups)}"
        held = [
            (layer, expert)
            for layer, holders in self.table.holders.items()
            for expert, groups in enumerate(holders)
            if group in groups
        ]
        self.groups[name] = TinyGroup(self.experts, held)
        replica = GroupReplica(group=group, replica=name, node=self.nodes[group], address="")
        return self.publish([r for r in self.table.replicas if r.group != group] + [replica])

    def publish(self, replicas=None, holders=None):
        """The next version of the table."""
        self.table = PlacementTable(
            version=self.table.version + 1,
            num_groups=self.table.num_groups,
            holders=holders or self.table.holders,
            replicas=tuple(sorted(self.table.replicas if replicas is None else replicas, key=lambda r: r.replica)),
        )
        return self.table

    def replica(self, group):
        return next(r.replica for r in self.table.replicas if r.group == group)

    def batch(self, num_tokens, top_k=4, seed=0, dtype=torch.float32):
        """(hidden_TH, expert_ids_TK, weights_TK) at random, experts distinct within a token."""
        generator = torch.Generator().manual_seed(seed)
        num_experts, hidden_size, _ = self.experts.weight_EHH.shape
        hidden_TH = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
        expert_ids_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k).indices
        return hidden_TH, expert_ids_TK, torch.rand(num_tokens, top_k, generator=generator)


class Servers:
    """An ExpertServer for every group of a mesh."""

    def __init__(self, mesh):
        self.mesh, self.servers = mesh, {}

    def table(self):
        """The mesh's table with the address of each replica, started where it was not."""
        replicas = []
        for replica in self.mesh.table.replicas:
            if replica.replica not in self.servers:
                self.servers[replica.replica] = ExpertServer(self.mesh.groups[replica.replica])
                self.servers[replica.replica].start()
            address = self.servers[replica.replica].address
            replicas.append(dataclasses.replace(replica, address=address))
        return dataclasses.replace(self.mesh.table, replicas=tuple(replicas))

    def stop(self):
        for server in self.servers.values():
            server.stop(0)


@pytest.fixture
def make_mesh():
    return Mesh


@pytest.fixture
def servers(mesh):
    servers = Servers(mesh)
    yield servers
    servers.stop()
