"""Batches sent by compiled code: the messages and sums of the ordinary way, and nothing that it would refuse."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from experts.wire.codec import encode_call
from router_service.counters import RouterCounters
from router_service.dispatch import plan_dispatch
from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.replica_choice import ReplicaChoice
from router_service.router import Router
from router_service.sender import Sender
from router_service.small_batches import SmallBatches
from router_service.table_view import TableView
from router_service.transport.base import TransportError
from router_service.transport.grpc_stream import GrpcTransport

HIDDEN = 48
SPECS = {
    "mixtral": GateSpec(system="mixtral", num_experts=8, num_experts_per_tok=2),
    "qwen3": GateSpec(system="qwen3_moe", num_experts=20, num_experts_per_tok=4, norm_topk_prob=True),
    "v2": GateSpec(system="deepseek_v2", num_experts=24, num_experts_per_tok=6, n_group=8, topk_group=3),
    "v3": GateSpec(system="deepseek_v3", num_experts=32, num_experts_per_tok=8, n_group=8, topk_group=4),
}


def gate_of(spec, hidden_size=HIDDEN):
    generator = torch.Generator().manual_seed(1)
    bias_E = torch.randn(spec.num_experts, generator=generator) * 0.2 if spec.system == "deepseek_v3" else None
    return build_gate(spec, torch.randn(spec.num_experts, hidden_size, generator=generator) * 0.3, bias_E)


class Recorder(GrpcTransport):
    """Keeps what would have been sent."""

    def __init__(self, **options):
        super().__init__(**options)
        self.sent = []

    def send_message(self, replica, call_id, message):
        self.sent.append((replica, call_id, bytes(message)))
        raise TransportError("it was kept")


def table_of(num_experts, groups, *, nodes=None, redundant=0, layer=3):
    holders = balanced({layer: num_experts}, groups, nodes_of_groups=nodes, num_redundant_experts=redundant)
    replicas = tuple(
        GroupReplica(group=g, replica=f"g{g}", node=nodes[g] if nodes else "n", address=f"127.0.0.1:{g + 1}")
        for g in range(groups)
    )
    return PlacementTable(version=1, num_groups=groups, holders=holders, replicas=replicas)


def small_batches(gates, transport=None, node="n"):
    transport, counters, replicas = transport or Recorder(), RouterCounters(), ReplicaChoice()
    sender = Sender(transport, replicas, counters, node)
    return SmallBatches(transport, gates, sender, replicas, counters, node), counters


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 64])
@pytest.mark.parametrize(("groups", "redundant"), [(1, 0), (2, 0), (5, 5)])
@pytest.mark.parametrize("name", SPECS)
def test_messages_are_those_of_the_ordinary_way(name, groups, redundant, num_tokens):
    spec = SPECS[name]
    gate, recorder = gate_of(spec), Recorder()
    small, counters = small_batches({3: gate}, recorder)
    view = TableView(table_of(spec.num_experts, groups, redundant=redundant))
    for seed in range(3):  # what one batch leaves behind is not in the next
        hidden_TH = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
        recorder.sent.clear()
        (node,) = small.send(view, 3, hidden_TH)
        plan = plan_dispatch(view.slots(3, frozenset()), 3, *gate(hidden_TH))
        assert len(recorder.sent) == len(plan.parts) == len(node.flights)
        for part, flight, (replica, call_id, message) in zip(plan.parts, node.flights, recorder.sent, strict=True):
            assert replica.group == part.group == flight.part.group
            assert message == encode_call(part.call(hidden_TH), call_id)
            for mine, other in zip(flight.part.rows(), part.rows(), strict=True):
                assert mine.tolist() == other.tolist()
    expected = 3 * num_tokens
    assert (counters.batches, counters.tokens, counters.token_nodes) == (3, expected, expected)
    assert counters.rows == expected * spec.num_experts_per_tok
    assert counters.bytes_sent == counters.token_copies * HIDDEN * 4
    assert counters.expert_tokens[3].sum() == counters.rows


@pytest.mark.parametrize(("experts", "num_tokens"), [(16, 8), (128, 15), (256, 64)])
def test_there_is_room_for_the_messages_of_many_groups(experts, num_tokens):
    spec = GateSpec(system="qwen3_moe", num_experts=experts, num_experts_per_tok=experts // 16 + 1)
    gate, view = gate_of(spec), TableView(table_of(experts, experts))
    for seed in range(10):
        recorder = Recorder()
        small, _ = small_batches({3: gate}, recorder)  # one that has no room yet
        hidden_TH = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
        small.send(view, 3, hidden_TH)
        plan = plan_dispatch(view.slots(3, frozenset()), 3, *gate(hidden_TH))
        for part, (_, call_id, message) in zip(plan.parts, recorder.sent, strict=True):
            assert message == encode_call(part.call(hidden_TH), call_id)


def test_what_is_no_small_batch_is_left_to_the_ordinary_way():
    spec = SPECS["mixtral"]
    gate, table = gate_of(spec), table_of(8, 2)
    view, hidden_TH = TableView(table), torch.randn(2, HIDDEN)
    small, _ = small_batches({3: gate})
    assert small.send(view, 3, hidden_TH)
    assert small.send(view, 4, hidden_TH) is None
    for other in (torch.randn(65, HIDDEN), hidden_TH.double(), hidden_TH.bfloat16(), hidden_TH[:0], hidden_TH[:, 1:]):
        assert small.send(view, 3, other) is None
    # Wide enough for shared memory, a dtype for the wire, a gate without a formula, an expert that nobody has.
    wide = gate_of(spec, 1 << 15)
    assert small_batches({3: wide})[0].send(view, 3, torch.randn(1, 1 << 15)) is None
    assert small_batches({3: gate}, Recorder(wire_dtype="bf16"))[0].send(view, 3, hidden_TH) is None
    assert small_batches({3: gate.gate})[0].send(view, 3, hidden_TH) is None
    assert small.send(TableView(table_of(7, 2)), 3, hidden_TH) is None
    # Groups that are lost, elsewhere, or elsewhere together.
    lost = dataclasses.replace(table, replicas=table.replicas[:1])
    assert small.send(TableView(lost), 3, hidden_TH) is None
    apart = TableView(table_of(8, 2, nodes=["n", "m"]))
    assert small.send(apart, 3, hidden_TH) is None
    assert small_batches({3: gate}, node=None)[0].send(apart, 3, hidden_TH)


@pytest.fixture
def mesh(make_mesh):
    return make_mesh(num_experts=20, hidden_size=HIDDEN, redundant=4)


@pytest.fixture
def make_router(mesh, servers):
    gate, routers = gate_of(SPECS["qwen3"]), []

    def make(transport=None, table=None):
        routers.append(Router(transport or GrpcTransport(), {0: gate}, recovery_timeout_s=10.0, node="n0"))
        routers[-1].update(table or servers.table())
        return routers[-1]

    yield make
    for router in routers:
        router.close()


@pytest.mark.parametrize("num_tokens", [1, 7, 64])
def test_sums_are_those_of_groups_in_process_bit_for_bit(mesh, make_router, num_tokens, monkeypatch):
    hidden_TH, _, _ = mesh.batch(num_tokens)
    expected = make_router(mesh.transport, mesh.table).route(0, hidden_TH).result()
    router = make_router()
    assert torch.equal(router.route(0, hidden_TH, timeout_s=20).result(), expected)
    received = router.counters.bytes_received
    monkeypatch.delattr("router_service.router.plan_dispatch")
    monkeypatch.delattr("router_service.sender.Sender.receive")
    assert torch.equal(router.route(0, hidden_TH).result(), expected)
    assert router.counters.bytes_received == 2 * received
    assert not router.replicas.rows_in_flight


def test_a_server_that_dies_is_replaced_and_the_sum_is_the_same(mesh, servers, make_router):
    hidden_TH, _, _ = mesh.batch(30)
    router = make_router()
    undisturbed = router.route(0, hidden_TH).result()
    for out in (False, True):
        before = router.counters.failovers
        if out:
            pending = router.route(0, hidden_TH)
        servers.servers[mesh.replica(2)].stop(0)
        if not out:
            pending = router.route(0, hidden_TH)
        mesh.start(2)
        router.update(servers.table())
        assert torch.equal(pending.result(), undisturbed)
        if not out:
            assert router.counters.failovers > before
        assert torch.equal(router.route(0, hidden_TH).result(), undisturbed)
        assert not router.replicas.rows_in_flight


def test_threads_do_not_disturb_each_other(mesh, make_router):
    router = make_router()
    batches = [mesh.batch(1 + seed % 20, seed=seed)[0] for seed in range(40)]
    expected = [router.route(0, hidden_TH).result() for hidden_TH in batches]
    wrong = []

    def run(first):
        wrong.extend(
            index
            for index in range(first, 40, 2)
            for _ in range(20)
            if not torch.equal(router.route(0, batches[index]).result(), expected[index])
        )

    threads = [threading.Thread(target=run, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong
