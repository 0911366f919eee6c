"""Batches sent by compiled code: the messages and sums of the ordinary way, and nothing that it would refuse."""

from __future__ import annotations

import dataclasses
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from experts.wire.codec import encode_call, encode_partial
from experts.wire.lane import Lane
from router_service.counters import RouterCounters
from router_service.dispatch import plan_dispatch
from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec
from router_service.placement import GroupReplica, PlacementTable, balanced
from router_service.replica_choice import ReplicaChoice
from router_service.router import Router
from router_service.small_batches import SmallBatches
from router_service.table_view import TableBoard, TableView
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


class Listeners(GrpcTransport):
    """A lane whose other ends keep what is sent, and answer when they are told to."""

    def __init__(self, **options):
        super().__init__(**options)
        self.ends = []

    def lane(self, replicas):
        pairs = [socket.socketpair() for _ in replicas]
        self.ends = [theirs for _, theirs in pairs]
        for end in self.ends:
            end.setblocking(False)
        return Lane([ours for ours, _ in pairs])

    def messages(self):
        """Of each group, None where it got none."""
        return [self._message(end) for end in self.ends]

    @staticmethod
    def _message(end):
        try:
            framed = end.recv(1 << 20)
        except BlockingIOError:
            return None
        assert int.from_bytes(framed[:4], "little") == len(framed) - 4
        return framed[4:]

    def close(self):
        super().close()
        for end in self.ends:
            end.close()


def table_of(num_experts, groups, *, nodes=None, redundant=0, layer=3):
    holders = balanced({layer: num_experts}, groups, nodes_of_groups=nodes, num_redundant_experts=redundant)
    replicas = tuple(
        GroupReplica(group=g, replica=f"g{g}", node=nodes[g] if nodes else "n", address=f"127.0.0.1:{g + 1}")
        for g in range(groups)
    )
    return PlacementTable(version=1, num_groups=groups, holders=holders, replicas=replicas)


@pytest.fixture
def small_batches():
    made = []

    def make(gates, transport=None, node="n"):
        transport, board = transport or Listeners(), TableBoard()
        small = SmallBatches(
            *(transport, gates, board, ReplicaChoice(), RouterCounters(), node),
            again=lambda *_: pytest.fail("it is asked again"),
            reply_timeout_s=30.0,
        )
        made.extend((small, transport))
        return small, transport

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 64])
@pytest.mark.parametrize(("groups", "redundant"), [(1, 0), (2, 0), (5, 5)])
@pytest.mark.parametrize("name", SPECS)
def test_messages_are_those_of_the_ordinary_way(small_batches, name, groups, redundant, num_tokens):
    spec = SPECS[name]
    gate = gate_of(spec)
    small, listeners = small_batches({3: gate})
    small.board.publish(table_of(spec.num_experts, groups, redundant=redundant))
    view = small.board.view
    counters, sent = small.counters, 0
    for seed in range(3):  # what one batch leaves behind is not in the next
        hidden_TH = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
        batch = small.send(view, 3, hidden_TH)
        plan, messages = plan_dispatch(view.slots(3, frozenset()), 3, *gate(hidden_TH)), listeners.messages()
        parts, expected_TH = {part.group: part for part in plan.parts}, torch.zeros(num_tokens, HIDDEN)
        for group, message in enumerate(messages):
            if group not in parts:
                assert message is None
                continue
            call, rows = parts[group].call(hidden_TH), parts[group].tokens_T
            assert message == encode_call(call, seed + 1)
            partial_TH = torch.randn(call.hidden_TH.shape)
            answer = encode_partial(seed + 1, partial_TH, torch.float32)
            listeners.ends[group].send(len(answer).to_bytes(4, "little") + answer)
            expected_TH[slice(None) if rows is None else rows.tolist()] += partial_TH
            sent += len(partial_TH)
        assert torch.equal(batch.result(), expected_TH)
    expected = 3 * num_tokens
    assert (counters.batches, counters.tokens, counters.token_nodes) == (3, expected, expected)
    assert counters.rows == expected * spec.num_experts_per_tok
    assert counters.token_copies == sent
    assert counters.bytes_sent == counters.bytes_received == sent * HIDDEN * 4
    assert counters.expert_tokens[3].sum() == counters.rows
    assert sum(counters.latency_counts) == 3


@pytest.mark.parametrize(("experts", "num_tokens"), [(16, 8), (128, 15), (256, 64)])
def test_there_is_room_for_the_messages_of_many_groups(small_batches, experts, num_tokens):
    spec = GateSpec(system="qwen3_moe", num_experts=experts, num_experts_per_tok=experts // 16 + 1)
    gate, view = gate_of(spec), TableView(table_of(experts, experts))
    small, listeners = small_batches({3: gate})
    hidden_TH = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(1))
    batch = small.send(view, 3, hidden_TH)
    messages = listeners.messages()
    for part in plan_dispatch(view.slots(3, frozenset()), 3, *gate(hidden_TH)).parts:
        assert messages[part.group] == encode_call(part.call(hidden_TH), 1)
    batch.cancel()


def test_what_is_no_small_batch_is_left_to_the_ordinary_way(small_batches):
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
    assert small_batches({3: gate}, Listeners(wire_dtype="bf16"))[0].send(view, 3, hidden_TH) is None
    assert small_batches({3: gate.gate})[0].send(view, 3, hidden_TH) is None
    assert small.send(TableView(table_of(7, 2)), 3, hidden_TH) is None
    # Groups that are lost, elsewhere, elsewhere together, or more than once; and nobody who listens.
    lost = dataclasses.replace(table, replicas=table.replicas[:1])
    assert small.send(TableView(lost), 3, hidden_TH) is None
    twice = dataclasses.replace(table.replicas[0], replica="another")
    assert small.send(TableView(dataclasses.replace(table, replicas=(*table.replicas, twice))), 3, hidden_TH) is None
    apart = TableView(table_of(8, 2, nodes=["n", "m"]))
    assert small.send(apart, 3, hidden_TH) is None
    assert small_batches({3: gate}, node=None)[0].send(apart, 3, hidden_TH)
    assert small_batches({3: gate}, GrpcTransport())[0].send(view, 3, hidden_TH) is None


def test_a_lane_lasts_until_something_is_out_of_the_ordinary(small_batches):
    gate, hidden_TH = gate_of(SPECS["mixtral"]), torch.randn(2, HIDDEN)
    small, listeners = small_batches(dict.fromkeys((3, 4), gate))
    table = dataclasses.replace(table_of(8, 1), holders=table_of(8, 1).holders | table_of(8, 1, layer=4).holders)
    small.board.publish(table)
    view = small.board.view

    def answered(layer, call_id):
        batch = small.send(view, layer, hidden_TH)
        answer = encode_partial(call_id, hidden_TH, torch.float32)
        listeners.ends[0].send(len(answer).to_bytes(4, "little") + answer)
        return torch.equal(batch.result(), hidden_TH)

    assert answered(3, 1)
    assert answered(4, 2)
    assert answered(3, 3)
    small.send(view, 3, hidden_TH).cancel()  # and what it owes with it
    assert answered(3, 1)
    del listeners.ends[:]  # the peer is gone
    assert small.send(view, 3, hidden_TH) is None
    assert answered(3, 1)
    small.board.publish(dataclasses.replace(table, version=2))
    view = small.board.view
    assert answered(3, 1)


def test_who_waits_for_a_batch_that_is_cancelled_stops(monkeypatch, small_batches):
    monkeypatch.setattr("router_service.small_batches.SmallBatches.patience_s", 0.01)
    gate, hidden_TH = gate_of(SPECS["mixtral"]), torch.randn(2, HIDDEN)
    small, listeners = small_batches({3: gate})
    small.board.publish(table_of(8, 1))
    cancelled = small.send(small.board.view, 3, hidden_TH)
    cancelled.cancel()
    with pytest.raises(TimeoutError, match="cancelled"):
        cancelled.result()
    batch = small.send(small.board.view, 3, hidden_TH)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(batch.result)
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        batch.cancel()
        with pytest.raises(TimeoutError, match="cancelled"):
            waiting.result(20)
    assert listeners.ends[-1].recv(1 << 20), "the group was asked"
    assert listeners.ends[-1].recv(1) == b"", "and its lane is closed"


def test_a_lane_is_for_batches_of_its_own_table(small_batches):
    gate, hidden_TH = gate_of(SPECS["mixtral"]), torch.randn(2, HIDDEN)
    small, _ = small_batches({3: gate})
    old, new = TableView(table_of(8, 1)), TableView(dataclasses.replace(table_of(8, 1), version=2))
    free = small.run(new, (3,), hidden_TH)
    free.end(2, [0.0])
    # A thread that had the older table when it was replaced comes late.
    late = small.run(old, (3,), hidden_TH)
    assert late._desk is not free._desk
    again = small.run(new, (3,), hidden_TH)
    assert again._desk is free._desk
    again.end(2, [0.0])
    late.end(2, [0.0])
    assert small.run(new, (3,), hidden_TH)._desk is free._desk


def test_only_so_many_are_out_at_a_time(monkeypatch, small_batches):
    monkeypatch.setattr("router_service.small_batches._MOST_OUT", 3)
    gate, hidden_TH = gate_of(SPECS["mixtral"]), torch.randn(2, HIDDEN)
    small, _ = small_batches({3: gate})
    small.board.publish(table_of(8, 1))
    out = [small.send(small.board.view, 3, hidden_TH) for _ in range(4)]
    assert out.pop() is None
    out.pop().cancel()
    out.append(small.send(small.board.view, 3, hidden_TH))
    assert out[-1] is not None
    assert small.send(small.board.view, 3, hidden_TH) is None


def test_what_is_late_is_asked_again_where_the_table_says_something_new(monkeypatch, small_batches):
    gate, hidden_TH, asked = gate_of(SPECS["mixtral"]), torch.randn(2, HIDDEN), []
    small, _ = small_batches({3: gate})
    small.board.publish(table_of(8, 1))
    view = small.board.view

    class Again:
        def result(self):
            return "the sum"

    monkeypatch.setattr(small, "again", lambda *call: asked.append(call) or Again())
    monkeypatch.setattr("router_service.small_batches.SmallBatches.patience_s", 0.001)
    publish = threading.Timer(0.1, small.board.publish, [dataclasses.replace(view.table, version=2)])
    batch = small.send(view, 3, hidden_TH)
    publish.start()
    assert batch.result() == "the sum"
    publish.join()
    ((layer, hidden, ids_TK, weights_TK),) = asked
    assert layer == 3
    assert hidden is hidden_TH
    assert ids_TK.equal(gate(hidden_TH).expert_ids_TK)
    assert weights_TK.equal(gate(hidden_TH).weights_TK)
    # Or where it has taken too long.
    monkeypatch.setattr(small, "reply_timeout_s", 0.01)
    view = small.board.view
    assert small.send(view, 3, hidden_TH).result() == "the sum"
    assert small._replicas.unreachable(view) == {0}  # and is not waited for again


def test_cancelling_reaches_what_was_asked_again(monkeypatch, small_batches):
    gate, hidden_TH = gate_of(SPECS["mixtral"]), torch.randn(2, HIDDEN)
    small, _ = small_batches({3: gate})
    small.board.publish(table_of(8, 1))
    asked, cancelled = threading.Event(), threading.Event()

    class Again:
        def result(self):
            asked.set()
            assert cancelled.wait(20)
            raise TimeoutError("cancelled")

        def cancel(self):
            cancelled.set()

    monkeypatch.setattr(small, "again", lambda *call: Again())
    monkeypatch.setattr(small, "reply_timeout_s", 0.01)
    monkeypatch.setattr("router_service.small_batches.SmallBatches.patience_s", 0.001)
    batch = small.send(small.board.view, 3, hidden_TH)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(batch.result)
        assert asked.wait(20)
        batch.cancel()
        with pytest.raises(TimeoutError, match="cancelled"):
            waiting.result(20)


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
