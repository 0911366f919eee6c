import math

from router_service.caller import Caller
from router_service.flight import NodeFlight
from router_service.transport.base import TransportError


class Reply:
    def __init__(self):
        self.cancelled = 0

    def cancel(self):
        self.cancelled += 1


def flight(reply, settled):
    return NodeFlight(version=1, reply=reply, settles=(lambda: settled.append(reply),))


def test_what_is_out_is_cancelled_whenever_it_was_sent():
    caller, replies, settled = Caller(), [Reply() for _ in range(3)], []
    assert caller.why_gone() is None
    sent = [caller.sent(flight(reply, settled)) for reply in replies[:2]]
    assert sent[0].reply is replies[0]
    caller.sent(flight(TransportError("not even sent"), settled))
    assert not settled
    caller.cancel()
    assert caller.why_gone() == "cancelled by its caller"
    # As a call that another thread was about to send.
    caller.sent(flight(replies[2], settled))
    assert [reply.cancelled for reply in replies] == [1, 1, 1]
    assert len(settled) == 4


def test_a_time_limit_is_counted_down(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("router_service.caller.time.monotonic", lambda: now[0])
    patient, caller = Caller(), Caller(60.0)
    assert caller.until == 160.0
    now[0] += 20.0
    assert caller.left_s() == 40.0
    assert caller.why_gone() is None
    now[0] += 40.0
    assert caller.left_s() == 0.0
    assert caller.why_gone() == "the caller's time limit passed"
    assert patient.until == math.inf
    assert patient.left_s() is None
    assert patient.why_gone() is None
