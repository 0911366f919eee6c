import threading

import pytest
import torch

from experts.errors import GroupUnavailable, RequestError
from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec
from router_service.router import Router


def make_router(mesh, gates=None, **options):
    router = Router(mesh.transport, gates or {}, recovery_timeout_s=5.0, **options)
    router.update(mesh.table)
    return router


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 17, 200])
@pytest.mark.parametrize(("num_groups", "redundant"), [(1, 0), (2, 0), (4, 0), (4, 8)])
def test_dispatch_equals_the_dense_sum(make_mesh, num_tokens, num_groups, redundant):
    mesh = make_mesh(num_groups=num_groups, redundant=redundant)
    router = make_router(mesh)
    batch = mesh.batch(num_tokens)
    out = router.dispatch(0, *batch).result()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), mesh.experts.reference(*batch), atol=1e-5, rtol=1e-5)


def test_dispatch_takes_no_expert_and_bfloat16(make_mesh):
    mesh = make_mesh()
    router = make_router(mesh)
    hidden_TH, ids_TK, weights_TK = mesh.batch(9, dtype=torch.bfloat16)
    ids_TK[0], ids_TK[3, 1] = -1, -1
    out = router.dispatch(0, hidden_TH, ids_TK, weights_TK).result()
    assert out.dtype == torch.bfloat16
    assert out[0].eq(0).all()
    reference = mesh.experts.reference(hidden_TH, ids_TK, weights_TK)
    torch.testing.assert_close(out.double(), reference, atol=2e-2, rtol=1e-2)


def test_route_is_gate_then_dispatch(make_mesh):
    mesh = make_mesh(layers=(1, 3))
    spec = GateSpec(system="mixtral", num_experts=16, num_experts_per_tok=2)
    gate = build_gate(spec, torch.randn(16, 8), None)
    router = make_router(mesh, {3: gate})
    hidden_TH, _, _ = mesh.batch(20)
    assert torch.equal(router.route(3, hidden_TH).result(), router.dispatch(3, hidden_TH, *gate(hidden_TH)).result())


def test_each_token_is_sent_to_a_group_once(make_mesh):
    mesh = make_mesh(num_groups=2)
    router = make_router(mesh)
    router.dispatch(0, *mesh.batch(40, top_k=8)).result()
    for group in mesh.groups.values():
        for call in group.calls:
            assert len(call.hidden_TH) <= 40
    assert router.counters.token_copies == sum(
        len(call.hidden_TH) for group in mesh.groups.values() for call in group.calls
    )
    assert router.counters.rows == 40 * 8


def test_counters_count_what_was_asked(make_mesh):
    mesh = make_mesh(layers=(2,))
    router = make_router(mesh)
    hidden_TH, ids_TK, weights_TK = mesh.batch(30)
    router.dispatch(2, hidden_TH, ids_TK, weights_TK).result()
    router.dispatch(2, hidden_TH, ids_TK, weights_TK).result()
    expected = torch.bincount(ids_TK.flatten(), minlength=16) * 2
    assert router.counters.expert_tokens[2].tolist() == expected.tolist()
    assert (router.counters.batches, router.counters.tokens) == (2, 60)
    assert sum(router.counters.latency_counts) == 2
    assert 0 < router.counters.latency_s < 60


def test_results_do_not_depend_on_the_company(make_mesh):
    """A token's output is the same alone and in a batch."""
    mesh = make_mesh(redundant=8)
    router = make_router(mesh)
    hidden_TH, ids_TK, weights_TK = mesh.batch(12)
    together = router.dispatch(0, hidden_TH, ids_TK, weights_TK).result()
    for token in range(12):
        one = slice(token, token + 1)
        alone = router.dispatch(0, hidden_TH[one], ids_TK[one], weights_TK[one]).result()
        torch.testing.assert_close(alone, together[one], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "change", "field"),
    [
        (9, {}, "layer"),
        (0, {"hidden_TH": torch.zeros(5, 2, 4)}, "hidden"),
        (0, {"hidden_TH": torch.zeros(5, 8, dtype=torch.int32)}, "hidden"),
        (0, {"expert_ids_TK": torch.zeros(4, 4, dtype=torch.long)}, "expert_ids"),
        (0, {"expert_ids_TK": torch.full((5, 4), 16)}, "expert_ids"),
        (0, {"expert_ids_TK": torch.full((5, 4), -2)}, "expert_ids"),
        (0, {"expert_ids_TK": torch.zeros(5, 4)}, "expert_ids"),
        (0, {"weights_TK": torch.zeros(5, 3)}, "weights"),
    ],
)
def test_bad_calls_name_the_field(make_mesh, layer, change, field):
    mesh = make_mesh()
    router = make_router(mesh)
    arguments = dict(zip(("hidden_TH", "expert_ids_TK", "weights_TK"), mesh.batch(5), strict=True)) | change
    with pytest.raises(RequestError) as caught:
        router.dispatch(layer, **arguments)
    assert caught.value.field == field
    with pytest.raises(RequestError, match="no gate here"):
        router.route(0, torch.zeros(1, 8))


def test_waits_for_the_first_table(make_mesh):
    mesh = make_mesh()
    router = Router(mesh.transport, {}, recovery_timeout_s=5.0)
    batch = mesh.batch(3)
    answer = []
    waiter = threading.Thread(target=lambda: answer.append(router.dispatch(0, *batch).result()))
    waiter.start()
    router.update(mesh.table)
    waiter.join(5)
    torch.testing.assert_close(answer[0].double(), mesh.experts.reference(*batch), atol=1e-5, rtol=1e-5)
    with pytest.raises(GroupUnavailable, match="recovery_timeout_s"):
        Router(mesh.transport, {}, recovery_timeout_s=0.01).dispatch(0, *batch)


def test_an_older_table_is_ignored(make_mesh):
    mesh = make_mesh()
    old = mesh.table
    router = make_router(mesh)
    router.update(mesh.start(1))
    router.update(old)
    assert router.table is mesh.table


@pytest.mark.parametrize("end", ["answered", "cancelled", "failed"])
def test_a_call_that_ended_weighs_on_no_replica(make_mesh, end):
    mesh = make_mesh(num_groups=3)
    router = make_router(mesh)
    hidden_TH, ids_TK, weights_TK = mesh.batch(30)
    if end == "failed":
        with pytest.raises(RequestError, match="wide"):
            router.dispatch(0, hidden_TH[:, :-1].contiguous(), ids_TK, weights_TK).result()
    else:
        pending = router.dispatch(0, hidden_TH, ids_TK, weights_TK)
        assert router.replicas.rows_in_flight == 30 * ids_TK.shape[1]
        if end == "answered":
            pending.result()
        pending.cancel()
    assert router.replicas.rows_in_flight == 0
