"""One copy per node: how the groups of another node share a message, and what happens when they fail."""

import itertools

import pytest
import torch

from experts.errors import GroupUnavailable
from router_service.router import Router
from router_service.transport.faulty import FaultyTransport

NODES = ["a", "b", "a", "b", "c", "c"]


@pytest.fixture
def make_router():
    def make(mesh, node, **options):
        transport = FaultyTransport(mesh.transport)
        router = Router(transport, {}, recovery_timeout_s=5.0, node=node, **options)
        router.update(mesh.table)
        return router, transport

    return make


@pytest.mark.parametrize("num_tokens", [1, 5, 60])
def test_the_output_does_not_depend_on_where_sums_are_made(make_mesh, make_router, num_tokens):
    mesh = make_mesh(num_experts=24, num_groups=6, nodes=NODES)
    batch = mesh.batch(num_tokens, top_k=6)
    outs = [make_router(mesh, node)[0].dispatch(0, *batch).result() for node in (None, "a", "c", "elsewhere")]
    assert all(torch.equal(out, outs[0]) for out in outs)
    torch.testing.assert_close(outs[0].double(), mesh.experts.reference(*batch), atol=1e-5, rtol=1e-5)


def test_a_token_crosses_to_a_node_once(make_mesh, make_router):
    mesh = make_mesh(num_experts=24, num_groups=6, nodes=NODES)
    hidden_TH, ids_TK, weights_TK = mesh.batch(60, top_k=6)
    router, transport = make_router(mesh, "elsewhere")
    router.dispatch(0, hidden_TH, ids_TK, weights_TK).result()
    node_of = [NODES[holder[0]] for holder in mesh.table.holders[0]]
    touched = sum(len({node_of[expert] for expert in ids}) for ids in ids_TK.tolist())
    assert transport.node_calls == 3
    assert router.counters.token_copies == router.counters.token_nodes == touched
    assert router.counters.bytes_sent_remote == touched * hidden_TH.shape[1] * 4
    # On one of the nodes, its own groups are called directly: nothing crosses.
    router, transport = make_router(mesh, "b")
    router.dispatch(0, hidden_TH, ids_TK, weights_TK).result()
    assert transport.node_calls == 2
    elsewhere = sum(len({node_of[expert] for expert in ids} - {"b"}) for ids in ids_TK.tolist())
    assert router.counters.bytes_sent_remote == elsewhere * hidden_TH.shape[1] * 4


@pytest.mark.parametrize("group", [1, 3])
def test_a_lost_group_of_a_node_comes_back_bitwise(make_mesh, make_router, group):
    mesh = make_mesh(num_experts=24, num_groups=6, nodes=NODES)
    batch = mesh.batch(60, top_k=6)
    router, transport = make_router(mesh, "a")
    undisturbed = router.dispatch(0, *batch).result()
    transport.lose_next(mesh.replica(group), 1)
    assert torch.equal(router.dispatch(0, *batch).result(), undisturbed)
    transport.kill(mesh.replica(group))
    pending = router.dispatch(0, *batch)
    router.update(mesh.start(group))
    assert torch.equal(pending.result(), undisturbed)
    assert router.counters.failovers >= 2


def test_a_stale_table_is_noticed_through_a_node(make_mesh, make_router):
    mesh = make_mesh(num_experts=24, num_groups=6, nodes=NODES)
    batch = mesh.batch(60, top_k=6)
    router, _ = make_router(mesh, "a")
    mesh.groups[mesh.replica(4)].held.discard((0, 16))
    mesh.groups[mesh.replica(0)].held.add((0, 16))
    pending = router.dispatch(0, *batch)
    holders = list(mesh.table.holders[0])
    holders[16] = (0,)
    router.update(mesh.publish(holders={0: tuple(holders)}))
    torch.testing.assert_close(pending.result().double(), mesh.experts.reference(*batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("on_expert_loss", ["fail", "failover"])
def test_nothing_is_owed_after_a_batch_that_failed(make_mesh, on_expert_loss):
    mesh = make_mesh(num_experts=24, num_groups=6, nodes=NODES)
    transport = FaultyTransport(mesh.transport)
    router = Router(transport, {}, recovery_timeout_s=0.05, node="elsewhere", on_expert_loss=on_expert_loss)
    router.update(mesh.table)
    transport.kill(mesh.replica(3))
    with pytest.raises(GroupUnavailable):
        router.dispatch(0, *mesh.batch(60, top_k=6)).result()
    assert router.replicas.rows_in_flight == 0


@pytest.mark.parametrize(("name", "node"), [("send", None), ("send_node", "elsewhere")])
def test_nothing_is_owed_where_sending_broke(make_mesh, monkeypatch, name, node):
    mesh = make_mesh(num_experts=24, num_groups=6, nodes=NODES)
    router = Router(mesh.transport, {}, recovery_timeout_s=5.0, node=node)
    router.update(mesh.table)
    send, times = getattr(mesh.transport, name), itertools.count()

    def break_second(*arguments, **named):
        if next(times) == 1:
            raise MemoryError("broken")
        return send(*arguments, **named)

    monkeypatch.setattr(mesh.transport, name, break_second)
    with pytest.raises(MemoryError):
        router.dispatch(0, *mesh.batch(60, top_k=6))
    assert router.replicas.rows_in_flight == 0
