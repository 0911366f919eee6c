import pytest

from experts.cancelled_calls import _MOST, CancelledCalls
from experts.wire.codec import CallCancelled


def test_a_cancelled_call_is_refused_once():
    cancelled = CancelledCalls()
    cancelled.check(7)
    cancelled.add([7, 8])
    cancelled.check(9)
    with pytest.raises(CallCancelled, match="before its call began"):
        cancelled.check(7)
    cancelled.check(7)
    with pytest.raises(CallCancelled):
        cancelled.check(8)


def test_the_oldest_are_forgotten():
    cancelled = CancelledCalls()
    cancelled.add(range(_MOST))
    cancelled.add([_MOST, 0])  # told again, 0 is no newer
    cancelled.check(0)
    for call_id in (1, _MOST):
        with pytest.raises(CallCancelled):
            cancelled.check(call_id)
