import dataclasses
import re
import threading
from contextlib import suppress
from queue import SimpleQueue

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from experts.errors import ConfigError
from experts.server import ExpertServer
from experts.wire.v1 import expert_pb2
from router_service import server as router_server
from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec
from router_service.router import Router
from router_service.server import RouterServer
from router_service.transport.grpc_stream import GrpcTransport
from router_service.wire.v1 import router_pb2 as pb
from router_service.wire.v1 import router_pb2_grpc


def tensor(hidden_TH):
    return expert_pb2.Tensor(dtype=expert_pb2.DTYPE_FLOAT32, shape=hidden_TH.shape, data=hidden_TH.numpy().tobytes())


def read(reply):
    return torch.frombuffer(bytearray(reply.combined.data), dtype=torch.float32).view(*reply.combined.shape)


@pytest.fixture
def mesh(make_mesh):
    return make_mesh(num_groups=2)


@pytest.fixture
def gate():
    torch.manual_seed(0)
    return build_gate(GateSpec(system="mixtral", num_experts=16, num_experts_per_tok=2), torch.randn(16, 8), None)


@pytest.fixture
def router(mesh, gate):
    """A router over real ExpertServers."""
    servers = {replica.replica: ExpertServer(mesh.groups[replica.replica]) for replica in mesh.table.replicas}
    for server in servers.values():
        server.start()
    router = Router(GrpcTransport(), {0: gate}, recovery_timeout_s=10.0)
    replicas = [dataclasses.replace(r, address=servers[r.replica].address) for r in mesh.table.replicas]
    router.update(dataclasses.replace(mesh.table, replicas=tuple(replicas)))
    yield router
    router.close()
    for server in servers.values():
        server.stop(0)


@pytest.fixture
def channel(router):
    server = RouterServer(router)
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        yield channel
    server.stop(0)


@pytest.fixture
def stub(channel):
    return router_pb2_grpc.RouterServiceStub(channel)


def dispatch_request(hidden_TH, ids_TK, weights_TK, **change):
    fields = {
        "call_id": 7,
        "experts_per_token": ids_TK.shape[1],
        "expert_ids": ids_TK.int().numpy().tobytes(),
        "weights": weights_TK.numpy().tobytes(),
        "hidden": tensor(hidden_TH),
    }
    return pb.DispatchRequest(**(fields | change))


def test_forward_and_dispatch_answer_as_the_router_does(mesh, router, gate, stub):
    hidden_TH, ids_TK, weights_TK = mesh.batch(20)
    reply = stub.Forward(pb.RouteRequest(call_id=3, hidden=tensor(hidden_TH)), timeout=20)
    assert reply.call_id == 3
    assert torch.equal(read(reply), router.route(0, hidden_TH).result())
    reply = stub.Dispatch(dispatch_request(hidden_TH, ids_TK, weights_TK))
    assert reply.call_id == 7
    torch.testing.assert_close(
        read(reply).double(), mesh.experts.reference(hidden_TH, ids_TK, weights_TK), atol=1e-5, rtol=1e-5
    )


def test_a_stream_takes_either_and_survives_a_bad_call(mesh, router, stub):
    batch = mesh.batch(5)
    route = pb.RouteRequest(call_id=1, hidden=tensor(batch[0]))
    requests = [
        pb.StreamRequest(route=route),
        pb.StreamRequest(dispatch=dispatch_request(*batch, layer=9)),
        pb.StreamRequest(),
        pb.StreamRequest(dispatch=dispatch_request(*batch, call_id=4)),
    ]
    replies = list(stub.Stream(iter(requests)))
    assert [reply.call_id for reply in replies] == [1, 7, 0, 4]
    assert [reply.failure.code for reply in replies] == [0, 3, 3, 0]
    assert "layer: 9" in replies[1].failure.message
    assert "call:" in replies[2].failure.message
    assert torch.equal(read(replies[0]), router.route(0, batch[0]).result())
    assert torch.equal(read(replies[3]), router.dispatch(0, *batch).result())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layer": 5}, "layer"),
        ({"experts_per_token": 0}, "experts_per_token"),
        ({"expert_ids": b"123"}, "expert_ids"),
        ({"expert_ids": torch.full((4, 4), 16, dtype=torch.int32).numpy().tobytes()}, "expert_ids"),
        ({"weights": b""}, "weights"),
        ({"hidden": tensor(torch.zeros(4, 9))}, "hidden"),
        ({"hidden": tensor(torch.zeros(4, 2, 4))}, "hidden"),
        ({"hidden": expert_pb2.Tensor(dtype=9, shape=[4, 8], data=bytes(128))}, "hidden.dtype"),
        ({"hidden": expert_pb2.Tensor(dtype=1, shape=[4, 8], data=bytes(12))}, "hidden.data"),
    ],
)
def test_bad_dispatches_are_invalid_arguments_that_name_the_field(mesh, stub, change, field):
    stub.Dispatch(dispatch_request(*mesh.batch(4)))
    request = dispatch_request(*mesh.batch(4), **change)
    with pytest.raises(grpc.RpcError) as caught:
        stub.Dispatch(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert re.match(rf"{field}[.:]", caught.value.details()), caught.value.details()


def test_bad_routes_are_invalid_arguments_that_name_the_field(stub):
    for request, field in [
        (pb.RouteRequest(layer=4, hidden=tensor(torch.zeros(2, 8))), "layer: 4"),
        (pb.RouteRequest(hidden=tensor(torch.zeros(2, 7))), "hidden: 7 wide"),
        (pb.RouteRequest(), "hidden"),
    ]:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Forward(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in caught.value.details()


def test_placement_can_be_read_and_watched(mesh, router, stub):
    placement = stub.GetPlacement(pb.GetPlacementRequest())
    assert placement.version == mesh.table.version
    assert [replica.group for replica in placement.replicas] == [0, 1]
    groups = {(expert.layer, expert.expert): tuple(expert.groups) for expert in placement.experts}
    assert groups == {(0, expert): holders for expert, holders in enumerate(mesh.table.holders[0])}
    watch = stub.WatchPlacement(pb.GetPlacementRequest(), timeout=20)
    assert next(watch).version == mesh.table.version
    router.update(dataclasses.replace(router.table, version=mesh.table.version + 5))
    assert next(watch).version == mesh.table.version + 5
    watch.cancel()


def test_who_watches_leaves_room_for_calls(stub, wait_until):
    def begin():
        watch = stub.WatchPlacement(pb.GetPlacementRequest())
        next(watch)
        return watch

    watches = [begin() for _ in range(router_server._MAX_WATCHES)]
    with pytest.raises(grpc.RpcError, match="64 watch already") as caught:
        begin()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert read(stub.Forward(pb.RouteRequest(hidden=tensor(torch.ones(1, 8))))).shape == (1, 8)
    for watch in watches:
        watch.cancel()

    def is_room():
        with suppress(grpc.RpcError):
            return begin().cancel()

    wait_until(is_room)


def test_streams_beyond_a_number_are_refused_and_calls_go_on(stub, channel):
    """Idle ones each keep a thread: others must have some left."""
    ends = [threading.Event() for _ in range(router_server._MAX_STREAMS)]
    request = pb.StreamRequest(route=pb.RouteRequest(hidden=tensor(torch.ones(1, 8))))

    def idle(end):
        yield request
        end.wait()

    streams = [stub.Stream(idle(end)) for end in ends]
    assert all(read(next(stream)).shape == (1, 8) for stream in streams)
    with pytest.raises(grpc.RpcError, match="256 streams are open already") as caught:
        next(stub.Stream(iter([request])))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert read(stub.Forward(pb.RouteRequest(hidden=tensor(torch.ones(1, 8))), timeout=20)).shape == (1, 8)
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    for end, stream in zip(ends, streams, strict=True):
        end.set()
        assert not list(stream)


def test_who_watches_hears_that_the_engine_stops(router):
    server = RouterServer(router)
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        watch = router_pb2_grpc.RouterServiceStub(channel).WatchPlacement(pb.GetPlacementRequest())
        next(watch)
        server.stop(60)
        with pytest.raises(grpc.RpcError, match="this engine stops") as caught:
            next(watch)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


class Stuck:
    """A group whose calls wait for `go`. heard: of a call that was cancelled"""

    def __init__(self, group):
        self.group, self.computed = group, 0
        self.entered, self.go, self.heard = threading.Event(), threading.Event(), threading.Event()

    def answer(self, request):
        return None

    def forward(self, call):
        self.entered.set()
        assert self.go.wait(20)
        self.computed += 1
        return self.group.forward(call)


@pytest.fixture
def stuck_mesh(make_mesh, gate):
    """(group that is stuck, an event for each RPC to it, set when that ended, router, stub of its RouterService)"""
    mesh = make_mesh(num_groups=1)
    stuck = Stuck(mesh.groups[mesh.replica(0)])
    ends = []

    class Watching(ExpertServer):
        def _forward(self, request, context):
            ended = threading.Event()
            ends.append(ended)
            context.add_callback(ended.set)
            return super()._forward(request, context)

        def _cancel(self, request, context):
            reply = super()._cancel(request, context)
            stuck.heard.set()
            return reply

    expert = Watching(stuck)
    expert.start()
    router = Router(GrpcTransport(), {0: gate}, recovery_timeout_s=60.0)
    replica = dataclasses.replace(mesh.table.replicas[0], address=expert.address)
    router.update(dataclasses.replace(mesh.table, replicas=(replica,)))
    server = RouterServer(router)
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        yield stuck, ends, router, router_pb2_grpc.RouterServiceStub(channel)
    stuck.go.set()
    server.stop(0)
    router.close()
    expert.stop(0)


def test_deadlines_and_cancellation_reach_the_experts(stuck_mesh):
    stuck, ends, router, stub = stuck_mesh
    request = pb.RouteRequest(hidden=tensor(torch.ones(1, 8)))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Forward(request, timeout=0.3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ends[0].wait(10), "the expert's RPC outlived the caller's deadline"
    stuck.entered.clear()
    call = stub.Forward.future(request)
    assert stuck.entered.wait(10)
    call.cancel()
    assert ends[1].wait(10), "the expert's RPC outlived its caller"
    # Neither made the replica look lost: the next call is served at once.
    stuck.go.set()
    stub.Forward(request, timeout=10)
    assert router.counters.failovers == 0


def test_a_streams_deadline_and_cancellation_reach_the_experts(stuck_mesh):
    stuck, ends, router, stub = stuck_mesh
    request = pb.StreamRequest(route=pb.RouteRequest(hidden=tensor(torch.ones(1, 8))))
    # Both are kept open: what ends them is the deadline, or the cancellation.
    calls, more = SimpleQueue(), SimpleQueue()
    calls.put(request)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Stream(iter(calls.get, None), timeout=0.3))
    calls.put(None)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert ends[0].wait(10), "the expert's RPC outlived the stream's deadline"
    stuck.entered.clear()
    stream = stub.Stream(iter(more.get, None), timeout=600)
    # A call that was answered, badly here, is not what the stream has out.
    more.put(pb.StreamRequest())
    assert next(stream).failure.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    more.put(request)
    assert stuck.entered.wait(10)
    stream.cancel()
    assert ends[1].wait(10), "the expert's RPC outlived the stream"
    more.put(None)
    # Neither made the replica look lost: the next stream is served at once.
    stuck.go.set()
    (reply,) = stub.Stream(iter([request]), timeout=10)
    assert read(reply).shape == (1, 8)
    assert router.counters.failovers == 0


def test_cancelling_a_stream_without_a_deadline_reaches_the_experts_too(stuck_mesh, wait_until):
    """Its calls share the groups' streams: a call that waits there behind another one is not computed."""
    stuck, ends, router, stub = stuck_mesh
    request = pb.StreamRequest(route=pb.RouteRequest(hidden=tensor(torch.ones(500, 8))))

    def begin():
        calls, rows = SimpleQueue(), router.replicas.rows_in_flight
        stream = stub.Stream(iter(calls.get, None))
        calls.put(request)
        wait_until(lambda: router.replicas.rows_in_flight == rows + 2 * 500)
        return stream, calls

    first, more = begin()
    assert stuck.entered.wait(10)  # or the other call might come before it
    waiting, no_more = begin()
    waiting.cancel()
    assert stuck.heard.wait(10), "the group was not told"
    assert stuck.computed == 0
    stuck.go.set()
    assert read(next(first)).shape == (500, 8)
    more.put(None)
    no_more.put(None)
    (reply,) = stub.Stream(iter([request]))
    assert read(reply).shape == (500, 8)
    assert stuck.computed == 2
    assert not ends, "an RPC of its own"
    assert (router.counters.failovers, router.replicas.rows_in_flight) == (0, 0)


@pytest.mark.parametrize("is_there", [False, True])
def test_an_unavailable_group_is_unavailable(stuck_mesh, is_there):
    """The group is in no table, or gives no answer: with no deadline of the caller's it is not that which passed."""
    _, _, stuck_router, _ = stuck_mesh
    router = Router(GrpcTransport(), stuck_router._gates, recovery_timeout_s=0.05)
    table = stuck_router.table
    router.update(table if is_there else dataclasses.replace(table, replicas=()))
    server = RouterServer(router)
    server.start()
    request = pb.RouteRequest(hidden=tensor(torch.ones(1, 8)))
    with grpc.insecure_channel(server.address) as channel:
        stub = router_pb2_grpc.RouterServiceStub(channel)
        for ask in (stub.Forward, lambda _: next(stub.Stream(iter([pb.StreamRequest(route=request)])))):
            try:
                failure = ask(request).failure
                code, words = failure.code, failure.message
            except grpc.RpcError as error:
                code, words = error.code().value[0], error.details()
            assert code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert "expert group 0" in words
    server.stop(0)
    router.close()


def test_health_and_reflection(channel):
    service = "expertmesh.router.v1.RouterService"
    reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    (listed,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
    assert service in {each.name for each in listed.list_services_response.service}


def test_health_waits_for_the_first_placement(mesh):
    router = Router(mesh.transport, {}, recovery_timeout_s=1.0)
    server = RouterServer(router)
    server.start()
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        requests = [
            health_pb2.HealthCheckRequest(service=service) for service in ("", "expertmesh.router.v1.RouterService")
        ]
        watches = [health.Watch(request, timeout=20) for request in requests]
        assert [next(watch).status for watch in watches] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2
        forward = router_pb2_grpc.RouterServiceStub(channel).Forward
        with pytest.raises(grpc.RpcError, match="no placement") as caught:
            forward(pb.RouteRequest(hidden=tensor(torch.ones(1, 8))))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        router.update(mesh.table)
        assert [next(watch).status for watch in watches] == [health_pb2.HealthCheckResponse.SERVING] * 2
        server.stop(0)
        assert [next(watch).status for watch in watches] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2
    router.close()


def test_a_taken_port_is_an_error_that_names_it(router):
    first = RouterServer(router)
    port = int(first.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=str(port)):
        RouterServer(router, port=port)
