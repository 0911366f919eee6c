import math

from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscale.policies.hysteresis import replicas_for


def test_a_load_that_hovers_at_a_boundary_moves_nothing():
    target = 2
    for load in [1.99, 2.01, 2.1, 1.95, 2.19, 1.81] * 5:
        target = replicas_for(load, target, 0.1)
        assert target == 2


def test_grows_past_the_tolerance_and_shrinks_with_room_to_spare():
    assert replicas_for(2.21, 2, 0.1) == 3
    assert replicas_for(0.95, 2, 0.1) == 2
    assert replicas_for(0.9, 2, 0.1) == 1
    assert replicas_for(7.5, 2, 0.1) == 8
    assert replicas_for(0.0, 5, 0.1) == 1
    assert replicas_for(0.1 + 0.2, 1, 0.0) == 1


@given(load=st.floats(0, 100), target=st.integers(1, 100), tolerance=st.floats(0, 0.9, exclude_max=True))
def test_a_steady_load_settles_at_once_and_is_covered(load, target, tolerance):
    settled = replicas_for(load, target, tolerance)
    assert replicas_for(load, settled, tolerance) == settled
    assert load <= settled * (1 + tolerance) + 1e-6
    assert settled <= max(target, math.ceil(load))
