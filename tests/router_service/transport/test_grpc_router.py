"""The router over real ExpertServers: every wire dtype, every bundling, and a server that dies."""

import pytest
import torch

from router_service.router import Router
from router_service.transport.grpc_stream import GrpcTransport

NODES = ["a", "a", "b", "b"]


@pytest.fixture
def mesh(make_mesh):
    return make_mesh(hidden_size=256, nodes=NODES)


@pytest.fixture
def make_router(servers):
    routers = []

    def make(node, wire_dtype="model", recovery_timeout_s=10.0):
        router = Router(GrpcTransport(wire_dtype), {}, recovery_timeout_s=recovery_timeout_s, node=node)
        router.update(servers.table())
        routers.append(router)
        return router

    yield make
    for router in routers:
        router.close()


@pytest.mark.parametrize("num_tokens", [1, 300])
def test_equals_the_groups_in_process_bit_for_bit(mesh, make_router, num_tokens):
    batch = mesh.batch(num_tokens)
    local = Router(mesh.transport, {}, recovery_timeout_s=1.0)
    local.update(mesh.table)
    expected = local.dispatch(0, *batch).result()
    for node in (None, "a", "elsewhere"):
        assert torch.equal(make_router(node).dispatch(0, *batch).result(), expected)


@pytest.mark.parametrize(("wire_dtype", "measured"), [("bf16", 0.0024), ("fp8", 0.028)])
@pytest.mark.parametrize("node", [None, "elsewhere"])
def test_narrow_wires_cost_what_the_readme_says(mesh, make_router, wire_dtype, measured, node):
    batch = mesh.batch(200)
    out = make_router(node, wire_dtype).dispatch(0, *batch).result()
    exact = mesh.experts.reference(*batch)
    error = float((out.double() - exact).norm() / exact.norm())
    assert measured / 1.5 < error < measured * 1.5


def test_a_server_that_dies_is_replaced_and_the_output_is_the_same(mesh, servers, make_router):
    batch = mesh.batch(100)
    for node in (None, "a", "elsewhere"):
        router = make_router(node)
        undisturbed = router.dispatch(0, *batch).result()
        servers.servers[mesh.replica(3)].stop(0)
        pending = router.dispatch(0, *batch)
        mesh.start(3)
        router.update(servers.table())
        assert torch.equal(pending.result(), undisturbed)


def test_a_call_with_a_time_limit_is_the_same_call(mesh, make_router):
    batch = mesh.batch(30)
    for node in (None, "elsewhere"):
        router = make_router(node)
        expected = router.dispatch(0, *batch).result()
        assert torch.equal(router.dispatch(0, *batch, timeout_s=20).result(), expected)
