import itertools
import os
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue

import grpc
import pytest
import torch

from experts.errors import ExpertNotResident
from experts.node_call import NodeCall, NodeShare
from experts.server import ExpertServer
from experts.wire.v1 import expert_pb2
from router_service.placement import GroupReplica, PlacementTable
from router_service.router import Router
from router_service.server import RouterServer
from router_service.transport.base import ReplyAbandoned, TransportError
from router_service.wire.v1 import router_pb2, router_pb2_grpc

ray = pytest.importorskip("ray")

from router_service.transport.ray_group import serve_calls  # noqa: E402
from router_service.transport.ray_refs import RayRefsTransport  # noqa: E402

pytestmark = pytest.mark.ray


def start_group(name, *, asynchronous, group=0, layers=(0,), gate=None, told=None):
    """An actor that serves a group in which an expert is worth 2 * hidden.

    gate: a FIFO that holds up the first call until somebody writes to it; told: a file that grows by a byte for each
    call cancelled. Ray itself tells nothing: an async actor with some calls in its queue answers nothing else.
    """

    class Group:
        def __init__(self):
            self.calls = 0

        def forward(self, call):
            self.calls += 1
            if gate and self.calls == 1:
                gate.read_bytes()
            if call.layer not in layers:
                raise ExpertNotResident(f"layer {call.layer} is not here", "layer")
            return 2 * call.hidden_TH.float()

    class Server(ExpertServer):
        def _cancel(self, request, context):
            reply = super()._cancel(request, context)
            with told.open("ab") as file:
                file.write(bytes(len(request.call_ids)))
            return reply

    class Plain:
        def __init__(self):
            self.group = Group()
            self.server = Server(self.group)
            self.server.start()
            serve_calls(self.group, self.server.cancelled, "mesh")

        def address(self):
            return self.server.address

        def calls(self):
            return self.group.calls

    class Async(Plain):
        async def address(self):
            return self.server.address

        async def calls(self):
            return self.group.calls

    actor_class = ray.remote(num_cpus=0)(Async if asynchronous else Plain)
    actor = actor_class.options(name=f"actor-{name}").remote()
    address = ray.get(actor.address.remote())
    return actor, GroupReplica(group=group, replica=name, node="n0", address=address, actor=f"actor-{name}")


@pytest.fixture
def held_up(tmp_path):
    """`gate` and `told` of a group."""
    gate, told = tmp_path / "gate", tmp_path / "told"
    os.mkfifo(gate)
    told.touch()
    yield {"gate": gate, "told": told}
    with suppress(OSError):  # nobody waits there, as it should be; else the process would never end
        os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory):
    ray.init(
        num_cpus=2,
        namespace="mesh",
        include_dashboard=False,
        logging_level="ERROR",
        _temp_dir=str(tmp_path_factory.mktemp("ray")),
    )
    yield
    ray.shutdown()


def call_until_it_fails(send):
    """Ray kills by message: calls that overtake it are still answered."""
    while True:
        send().result(20)


@pytest.mark.usefixtures("local_ray")
def test_calls_reach_actors_of_both_kinds_and_failures_are_told_apart(make_call):
    transport = RayRefsTransport("mesh")
    for asynchronous in (False, True):
        actor, replica = start_group(f"g{asynchronous}", asynchronous=asynchronous)
        for dtype in (torch.float32, torch.bfloat16):
            for num_tokens in (1, 2048):
                hidden_TH = torch.randn(num_tokens, 64).to(dtype)
                partial_TH = transport.send(replica, make_call(hidden_TH)).result(20)
                assert torch.equal(partial_TH, 2 * hidden_TH.float())
        with pytest.raises(ExpertNotResident, match="layer 3 is not here"):
            transport.send(replica, make_call(torch.ones(1, 4), layer=3)).result(20)
        ray.kill(actor)
        with pytest.raises(TransportError, match=r"Died|Unavailable|no actor"):
            call_until_it_fails(partial(transport.send, replica, make_call(torch.ones(1, 4))))
    with pytest.raises(TransportError, match="no actor 'nobody'"):
        transport.send(
            GroupReplica(group=1, replica="x", node="n", address="", actor="nobody"),
            make_call(torch.ones(1, 4)),
        )


@pytest.mark.usefixtures("local_ray")
def test_tensors_travel_in_the_wire_dtype(make_call):
    started = [start_group(f"wire-{group}", group=group, asynchronous=True) for group in range(2)]
    actors, replicas = zip(*started, strict=True)
    for num_tokens in (2, 512):
        hidden_TH = torch.randn(num_tokens, 128)
        for wire_dtype, tolerance in (("model", 0), ("bf16", 2**-7), ("fp8", 2**-3)):
            transport = RayRefsTransport("mesh", wire_dtype)
            partial_TH = transport.send(replicas[0], make_call(hidden_TH)).result(20)
            sum_TH = transport.send_node(replicas, node_call(hidden_TH, (None, None))).result(20)
            # The node's groups read the same bytes, and their sum is rounded once.
            assert torch.equal(sum_TH, 2 * partial_TH)
            assert torch.equal(partial_TH, partial_TH.bfloat16().float()) == (wire_dtype != "model")
            error_TH = (partial_TH / 2 - hidden_TH).abs()
            assert (error_TH <= tolerance * hidden_TH.abs() + tolerance * 2**-9 * hidden_TH.abs().max()).all()
            assert (error_TH.max() > 0) == (wire_dtype != "model")
    assert all(ray.get(actor.calls.remote()) for actor in actors)


def node_call(hidden_TH, tokens, layer=0, relay=0):
    """A share for each of `tokens` (rows of hidden_TH, None: all); what it says of experts no group here reads."""
    shares = tuple(
        NodeShare(
            group=group,
            address="" if group == relay else "sibling",
            tokens_T=tokens_T,
            expert_ids_S=torch.zeros(1, dtype=torch.int32),
            offsets_S1=torch.tensor([0, 1], dtype=torch.int32),
            token_rows_R=torch.zeros(1, dtype=torch.int32),
            weights_R=torch.ones(1),
        )
        for group, tokens_T in enumerate(tokens)
    )
    return NodeCall(layer=layer, hidden_TH=hidden_TH, shares=shares)


@pytest.mark.usefixtures("local_ray")
def test_a_node_of_actors_answers_with_one_sum():
    """Two groups, each worth 2 * hidden for its tokens; the larger batch is shared as one object."""
    transport = RayRefsTransport("mesh")
    # An actor lives as long as its handle.
    started = [
        start_group(f"node-{group}", group=group, asynchronous=group == 1, layers=layers)
        for group, layers in enumerate([(0, 5), (0,)])
    ]
    actors, replicas = zip(*started, strict=True)
    for num_tokens in (3, 2048):
        hidden_TH = torch.randn(num_tokens, 64)
        tokens_T = torch.arange(0, num_tokens, 2, dtype=torch.int32)
        expected = 2 * hidden_TH
        expected[tokens_T] += 2 * hidden_TH[tokens_T]
        for tokens in ((tokens_T, None), (None, tokens_T)):
            assert torch.equal(transport.send_node(replicas, node_call(hidden_TH, tokens)).result(20), expected)
    for layer in (3, 5):  # which neither holds, and which the sibling does not
        with pytest.raises(ExpertNotResident, match=f"layer {layer} is not here"):
            transport.send_node(replicas, node_call(hidden_TH, (None, None), layer)).result(20)
    ray.kill(actors[1])
    with pytest.raises(TransportError, match=r"actor actor-node-1 on this node|no actor 'actor-node-1'"):
        call_until_it_fails(partial(transport.send_node, replicas, node_call(hidden_TH, (None, None))))


@pytest.mark.usefixtures("local_ray")
def test_calls_of_a_node_do_not_wait_for_each_other_in_a_circle():
    """Each of two groups is named the receiver of half of the calls, which are all out at once."""
    started = [start_group(f"circle-{group}", group=group, asynchronous=True) for group in range(2)]
    replicas = [replica for _, replica in started]
    transports = RayRefsTransport("mesh"), RayRefsTransport("mesh")
    hidden_TH = torch.randn(4, 8)
    replies = [
        transport.send_node(replicas, node_call(hidden_TH, (None, None), relay=relay))
        for _, transport, relay in itertools.product(range(10), transports, range(2))
    ]
    for reply in replies:
        assert torch.equal(reply.result(60), 4 * hidden_TH)


@pytest.mark.usefixtures("local_ray")
def test_a_lost_group_of_a_node_is_replaced_and_the_output_is_the_same():
    actors, replicas = zip(*(start_group(f"lost-{g}", group=g, asynchronous=True) for g in range(2)), strict=True)
    table = PlacementTable(version=1, num_groups=2, holders={0: ((0,), (1,))}, replicas=replicas)
    router = Router(RayRefsTransport("mesh"), {}, recovery_timeout_s=60.0, node="elsewhere")
    router.update(table)
    batch = torch.randn(6, 8), torch.tensor([[0, 1]] * 6), torch.ones(6, 2)
    undisturbed = router.dispatch(0, *batch).result()
    assert torch.equal(undisturbed, 4 * batch[0])
    assert router.counters.bytes_sent_remote == batch[0].nbytes
    ray.kill(actors[1])
    pending = router.dispatch(0, *batch)
    new_actor, new = start_group("lost-again", group=1, asynchronous=True)
    router.update(PlacementTable(version=2, num_groups=2, holders=table.holders, replicas=(replicas[0], new)))
    assert torch.equal(pending.result(), undisturbed)
    assert torch.equal(router.dispatch(0, *batch).result(), undisturbed)
    assert ray.get(new_actor.calls.remote())


@contextmanager
def router_service(router):
    """A stub of its RouterService."""
    server = RouterServer(router)
    server.start()
    try:
        with grpc.insecure_channel(server.address) as channel:
            yield router_pb2_grpc.RouterServiceStub(channel)
    finally:
        server.stop(0)
        router.close()


def dispatch_request():
    """One token of ones, for expert 0."""
    hidden = expert_pb2.Tensor(dtype=expert_pb2.DTYPE_FLOAT32, shape=(1, 4), data=torch.ones(1, 4).numpy().tobytes())
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    return router_pb2.DispatchRequest(
        experts_per_token=1, expert_ids=ids.numpy().tobytes(), weights=weights.numpy().tobytes(), hidden=hidden
    )


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_queued_call_that_nobody_wants_any_more_is_not_computed(make_call, wait_until, held_up, asynchronous):
    actor, replica = start_group(f"skip-{asynchronous}", asynchronous=asynchronous, **held_up)
    transport = RayRefsTransport("mesh")
    call, node = make_call(torch.ones(1, 4)), node_call(torch.ones(1, 4), (None,))
    first = transport.send(replica, call)
    told = itertools.count(1)

    def wait_told():
        count = next(told)
        wait_until(lambda: held_up["told"].stat().st_size == count)

    for cancelled in (transport.send(replica, call), transport.send_node([replica], node)):
        cancelled.cancel()
        wait_told()
        cancelled.cancel()  # of which nobody is told again
        with pytest.raises(ReplyAbandoned):
            cancelled.result(20)
    for patience_s in (None, 0.05):
        for late in (transport.send(replica, call, 0.05), transport.send_node([replica], node, 0.05)):
            with pytest.raises(ReplyAbandoned, match="time limit"):
                late.result(patience_s)
            wait_told()

    router = Router(transport, {}, recovery_timeout_s=60.0)
    router.update(PlacementTable(version=1, num_groups=1, holders={0: ((0,),)}, replicas=(replica,)))
    with router_service(router) as stub:
        with pytest.raises(grpc.RpcError) as caught:
            stub.Dispatch(dispatch_request(), timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_told()
        wait_until(lambda: router.replicas.rows_in_flight == 0)
        calls = SimpleQueue()
        stream = stub.Stream(iter(calls.get, None))
        calls.put(router_pb2.StreamRequest(dispatch=dispatch_request()))
        wait_until(lambda: router.replicas.rows_in_flight == 1)
        stream.cancel()
        calls.put(None)
        wait_told()
        last = transport.send(replica, call)
        held_up["gate"].write_bytes(b"")
        assert first.result(20).eq(2).all()
        assert last.result(20).eq(2).all()
        last.cancel()
        assert ray.get(actor.calls.remote()) == 2
        # The replica does not look lost: the next call is its.
        reply = stub.Dispatch(dispatch_request(), timeout=60)
        assert torch.frombuffer(bytearray(reply.combined.data), dtype=torch.float32).eq(2).all()
        assert router.counters.failovers == 0


@pytest.mark.usefixtures("local_ray")
def test_a_callers_patience_is_not_its_time_limit(make_call, held_up):
    actor, replica = start_group("late", asynchronous=False, **held_up)
    transport = RayRefsTransport("mesh")
    call, node = make_call(torch.ones(1, 4)), node_call(torch.ones(1, 4), (None,))
    first = transport.send(replica, call)
    for timeout_s in (None, 100.0):
        for reply in (transport.send(replica, call, timeout_s), transport.send_node([replica], node, timeout_s)):
            with pytest.raises(TransportError, match="no reply in time") as caught:
                reply.result(0.05)
            assert not isinstance(caught.value, ReplyAbandoned)
    held_up["gate"].write_bytes(b"")
    assert first.result(20).eq(2).all()
    assert transport.send(replica, call).result(20).eq(2).all()
    assert ray.get(actor.calls.remote()) == 6
