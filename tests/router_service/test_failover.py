import threading

import pytest
import torch

from experts.errors import ExpertNotResident, GroupUnavailable
from router_service.router import Router
from router_service.transport.faulty import FaultyTransport


@pytest.fixture
def make_router():
    def make(mesh, *, recovery_timeout_s=5.0, **options):
        transport = FaultyTransport(mesh.transport)
        router = Router(transport, {}, recovery_timeout_s=recovery_timeout_s, **options)
        router.update(mesh.table)
        return router, transport

    return make


def in_background(work):
    """Start `work` in a thread; the returned function joins it and gives its outcome."""
    outcome = []

    def run():
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def join():
        thread.join(10)
        assert not thread.is_alive()
        return outcome[0]

    return join


@pytest.mark.parametrize("on_expert_loss", ["failover", "reload"])
def test_waits_for_the_new_replica_and_the_output_is_bitwise_the_same(make_mesh, make_router, on_expert_loss):
    mesh = make_mesh()
    router, transport = make_router(mesh, on_expert_loss=on_expert_loss)
    batch = mesh.batch(50)
    undisturbed = router.dispatch(0, *batch).result()
    dead = mesh.replica(2)
    transport.kill(dead)
    join = in_background(lambda: router.dispatch(0, *batch).result())
    assert transport.wait_sent(dead, 2, 5.0)
    router.update(mesh.start(2))
    assert torch.equal(join(), undisturbed)
    assert router.counters.failovers == 1
    # And the next batch goes straight to the new one.
    assert torch.equal(router.dispatch(0, *batch).result(), undisturbed)
    assert router.counters.failovers == 1


def test_a_reply_lost_in_flight_is_asked_for_again(make_mesh, make_router):
    mesh = make_mesh()
    router, transport = make_router(mesh)
    batch = mesh.batch(20)
    undisturbed = router.dispatch(0, *batch).result()
    pending_replica = mesh.replica(1)
    transport.lose_next(pending_replica, 1)
    pending = router.dispatch(0, *batch)
    router.update(mesh.start(1))
    assert torch.equal(pending.result(), undisturbed)


def test_a_path_that_heals_needs_no_new_table(make_mesh, make_router):
    mesh = make_mesh()
    router, transport = make_router(mesh)
    batch = mesh.batch(20)
    undisturbed = router.dispatch(0, *batch).result()
    transport.lose_next(mesh.replica(1), 1)
    assert torch.equal(router.dispatch(0, *batch).result(), undisturbed)


def test_redundant_experts_take_over_without_waiting(make_mesh, make_router):
    mesh = make_mesh(num_groups=2, redundant=16)
    router, transport = make_router(mesh, recovery_timeout_s=0.01)
    batch = mesh.batch(50)
    transport.kill(mesh.replica(0))
    out = router.dispatch(0, *batch).result()
    torch.testing.assert_close(out.double(), mesh.experts.reference(*batch), atol=1e-5, rtol=1e-5)
    # What is known dead is not asked again at once.
    asked = transport.sent[mesh.replica(0)]
    router.dispatch(0, *batch).result()
    assert transport.sent[mesh.replica(0)] == asked


def test_partly_redundant_experts_split_between_taking_over_and_waiting(make_mesh, make_router):
    mesh = make_mesh(num_groups=2, redundant=8)
    router, transport = make_router(mesh)
    batch = mesh.batch(50)
    dead = mesh.replica(0)
    transport.kill(dead)
    join = in_background(lambda: router.dispatch(0, *batch).result())
    assert transport.wait_sent(dead, 1, 5.0)
    router.update(mesh.start(0))
    torch.testing.assert_close(join().double(), mesh.experts.reference(*batch), atol=1e-5, rtol=1e-5)


def test_a_second_replica_of_the_group_takes_over_bitwise(make_mesh, make_router):
    mesh = make_mesh()
    first = mesh.table
    mesh.start(3)
    mesh.publish([*first.replicas, next(r for r in mesh.table.replicas if r.group == 3)])
    router, transport = make_router(mesh, recovery_timeout_s=0.01)
    batch = mesh.batch(30)
    undisturbed = router.dispatch(0, *batch).result()
    transport.kill(next(r.replica for r in first.replicas if r.group == 3))
    assert torch.equal(router.dispatch(0, *batch).result(), undisturbed)


def test_past_the_bound_the_group_is_named(make_mesh, make_router):
    mesh = make_mesh()
    router, transport = make_router(mesh, recovery_timeout_s=0.05)
    transport.kill(mesh.replica(2))
    with pytest.raises(GroupUnavailable, match=r"group 2 .*injected.*recovery_timeout_s \(0\.05 s\)") as caught:
        router.dispatch(0, *mesh.batch(50)).result()
    assert caught.value.group == 2


def test_a_callers_deadline_is_not_called_the_routers(make_mesh, make_router):
    mesh = make_mesh()
    router, transport = make_router(mesh, recovery_timeout_s=600)
    transport.kill(mesh.replica(2))
    with pytest.raises(TimeoutError, match=r"group 2: .*injected.*the caller's time"):
        router.dispatch(0, *mesh.batch(50), timeout_s=0.05).result()


def test_what_fails_after_the_callers_deadline_says_nothing_of_the_replica(make_mesh, make_router):
    mesh = make_mesh()
    batch = mesh.batch(50)
    for node in (None, "elsewhere"):
        router, transport = make_router(mesh, recovery_timeout_s=600, node=node)
        transport.lose_next(mesh.replica(2), 1)
        with pytest.raises(TimeoutError, match=r"connection lost.*the caller's time"):
            router.dispatch(0, *batch, timeout_s=0.0).result()
        router.dispatch(0, *batch).result()
        assert router.counters.failovers == 0


def test_cancelling_ends_the_wait_for_a_group_that_is_lost(make_mesh, make_router):
    mesh = make_mesh()
    router, transport = make_router(mesh, recovery_timeout_s=600)
    dead = mesh.replica(2)
    transport.kill(dead)
    pending = router.dispatch(0, *mesh.batch(50))
    join = in_background(pending.result)
    assert transport.wait_sent(dead, 2, 5.0)
    pending.cancel()
    error = join()
    assert isinstance(error, TimeoutError)
    assert "cancelled by its caller" in str(error)


@pytest.mark.parametrize("nodes", [["n0"] * 4, ["n0", "n0", "n1", "n1"]])
@pytest.mark.parametrize("lost", range(4))
def test_a_call_that_begins_while_a_group_is_lost_gives_the_same_bits(make_mesh, make_router, nodes, lost):
    mesh = make_mesh(nodes=nodes)
    batch = mesh.batch(50, top_k=16)
    router, transport = make_router(mesh, node="n0")
    undisturbed = router.dispatch(0, *batch).result()
    transport.kill(mesh.replica(lost))
    router.replicas.lost(next(r for r in mesh.table.replicas if r.group == lost), "killed")
    listed = router.dispatch(0, *batch)
    router.update(mesh.publish([r for r in mesh.table.replicas if r.group != lost]))
    missing = router.dispatch(0, *batch)
    router.update(mesh.start(lost))
    for pending in (listed, missing, router.dispatch(0, *batch)):
        assert torch.equal(pending.result(), undisturbed)
    assert router.counters.failovers == 2


def test_a_group_without_any_replica_is_waited_for(make_mesh, make_router):
    mesh = make_mesh()
    batch = mesh.batch(50)
    gone = mesh.publish([r for r in mesh.table.replicas if r.group != 1])
    router, _ = make_router(mesh)
    assert gone.missing_groups() == (1,)
    pending = router.dispatch(0, *batch)
    router.update(mesh.start(1))
    torch.testing.assert_close(pending.result().double(), mesh.experts.reference(*batch), atol=1e-5, rtol=1e-5)


def test_fail_raises_at_once(make_mesh, make_router):
    mesh = make_mesh()
    router, transport = make_router(mesh, recovery_timeout_s=600, on_expert_loss="fail")
    transport.kill(mesh.replica(0))
    with pytest.raises(GroupUnavailable, match="on_expert_loss is fail"):
        router.dispatch(0, *mesh.batch(50)).result()


def test_degrade_leaves_the_group_out_and_counts(make_mesh, make_router):
    mesh = make_mesh()
    router, transport = make_router(mesh, recovery_timeout_s=600, on_expert_loss="degrade")
    transport.kill(mesh.replica(0))
    hidden_TH, ids_TK, weights_TK = mesh.batch(50)
    out = router.dispatch(0, hidden_TH, ids_TK, weights_TK).result()
    lost = torch.isin(ids_TK, torch.tensor([e for e, held in enumerate(mesh.table.holders[0]) if held == (0,)]))
    left = mesh.experts.reference(hidden_TH, ids_TK.masked_fill(lost, -1), weights_TK)
    torch.testing.assert_close(out.double(), left, atol=1e-5, rtol=1e-5)
    assert router.counters.degraded_tokens == int(lost.any(dim=1).sum()) > 0


def test_an_expert_that_moved_waits_for_the_table_that_says_so(make_mesh, make_router):
    mesh = make_mesh()
    router, transport = make_router(mesh)
    batch = mesh.batch(50)
    # Group 0 gives expert 0 to group 3, and the router's table does not know yet.
    mesh.groups[mesh.replica(0)].held.discard((0, 0))
    mesh.groups[mesh.replica(3)].held.add((0, 0))
    join = in_background(lambda: router.dispatch(0, *batch).result())
    assert transport.wait_sent(mesh.replica(0), 1, 5.0)
    router.update(mesh.publish(holders={0: ((3,), *mesh.table.holders[0][1:])}))
    torch.testing.assert_close(join().double(), mesh.experts.reference(*batch), atol=1e-5, rtol=1e-5)


def test_an_expert_that_nobody_finds_is_unavailable(make_mesh, make_router):
    mesh = make_mesh()
    router, _ = make_router(mesh, recovery_timeout_s=0.05)
    mesh.groups[mesh.replica(0)].held.discard((0, 0))
    with pytest.raises(GroupUnavailable, match="expert 0 is not here") as caught:
        router.dispatch(0, *mesh.batch(50)).result()
    assert isinstance(caught.value.__cause__, ExpertNotResident)


def test_two_groups_lost_at_once(make_mesh, make_router):
    mesh = make_mesh()
    router, transport = make_router(mesh)
    batch = mesh.batch(50)
    undisturbed = router.dispatch(0, *batch).result()
    first, second = mesh.replica(0), mesh.replica(3)
    transport.kill(first)
    transport.kill(second)
    join = in_background(lambda: router.dispatch(0, *batch).result())
    assert transport.wait_sent(second, 2, 5.0)
    router.update(mesh.start(0))
    router.update(mesh.start(3))
    assert torch.equal(join(), undisturbed)
