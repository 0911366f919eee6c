import threading

import pytest
import torch

from experts.errors import ExpertNotResident, RequestError
from router_service.placement import GroupReplica
from router_service.transport.base import TransportError
from router_service.transport.grpc_stream import GrpcTransport


@pytest.fixture
def transport():
    transport = GrpcTransport()
    yield transport
    transport.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 3, 2048])
def test_a_call_goes_there_and_back(transport, serve_group, doubler, make_call, num_tokens, dtype):
    hidden_TH = torch.randn(num_tokens, 512).to(dtype)
    partial_TH = transport.send(serve_group(doubler).replica(), make_call(hidden_TH)).result(10)
    assert partial_TH.dtype == torch.float32
    assert torch.equal(partial_TH, 2 * hidden_TH.float())


def test_replies_may_be_taken_in_any_order_and_by_many_threads(transport, serve_group, doubler, make_call):
    replica = serve_group(doubler).replica()
    replies = [transport.send(replica, make_call(torch.full((2, 4), float(i)))) for i in range(40)]
    for i in (39, 0, 20):
        assert replies[i].result(10).eq(2 * i).all()
    wrong = []

    def take(i):
        if not replies[i].result(10).eq(2 * i).all():
            wrong.append(i)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(1, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert not wrong


def test_a_refused_call_leaves_the_stream_alive(transport, serve_group, doubler, make_call):
    replica = serve_group(doubler).replica()
    good, bad = make_call(torch.ones(1, 4)), make_call(torch.ones(1, 4), layer=7)
    first, refused, last = (transport.send(replica, call) for call in (good, bad, good))
    assert last.result(10).eq(2).all()
    with pytest.raises(ExpertNotResident, match="layer 7 is not here"):
        refused.result(10)
    assert first.result(10).eq(2).all()


def test_a_group_that_breaks_inside_may_be_asked_elsewhere(transport, serve_group, doubler, make_call):
    with pytest.raises(TransportError, match="the device is gone"):
        transport.send(serve_group(doubler).replica(), make_call(torch.ones(1, 4), layer=99)).result(10)


def test_a_dead_peer_fails_everything_that_is_out_at_once(transport, serve_group, doubler, make_call):
    served = serve_group(doubler)
    doubler.gate.clear()
    replies = [transport.send(served.replica(), make_call(torch.ones(1, 4))) for _ in range(3)]
    assert doubler.arrived.acquire(timeout=10)
    served.kill()
    doubler.gate.set()
    for reply in replies:
        with pytest.raises(TransportError, match="g0-0 at 127"):
            reply.result(60)


def test_nobody_listening_is_refused_and_a_start_is_noticed(transport, serve_group, doubler, make_call):
    served = serve_group(doubler)
    served.kill()
    with pytest.raises(TransportError, match="UNAVAILABLE"):
        transport.send(served.replica(), make_call(torch.ones(1, 4))).result(10)
    again = serve_group(doubler, served.port)
    assert transport.send(again.replica(start=1), make_call(torch.ones(1, 4))).result(10).eq(2).all()


def test_a_silent_peer_is_given_up_in_time(transport, serve_group, doubler, make_call):
    served = serve_group(doubler)
    doubler.gate.clear()
    reply = transport.send(served.replica(), make_call(torch.ones(1, 4)))
    with pytest.raises(TransportError, match="no reply in time"):
        reply.result(0.05)
    doubler.gate.set()


def test_forgetting_a_replica_ends_its_calls(transport, serve_group, doubler, make_call):
    served = serve_group(doubler)
    doubler.gate.clear()
    reply = transport.send(served.replica(), make_call(torch.ones(1, 4)))
    assert doubler.arrived.acquire(timeout=10)
    transport.forget(served.replica())
    with pytest.raises(TransportError, match="left the placement table"):
        reply.result(60)
    doubler.gate.set()


def test_a_call_that_does_not_fit_the_wire_names_its_field(transport, serve_group, doubler, make_call):
    with pytest.raises(RequestError, match="dtype"):
        transport.send(serve_group(doubler).replica(), make_call(torch.ones(1, 4, dtype=torch.float64)))


def test_a_closed_transport_sends_nothing(make_call):
    transport = GrpcTransport()
    transport.close()
    replica = GroupReplica(group=0, replica="g0", node="n", address="127.0.0.1:1")
    with pytest.raises(TransportError, match="closed"):
        transport.send(replica, make_call(torch.ones(1, 4)))
