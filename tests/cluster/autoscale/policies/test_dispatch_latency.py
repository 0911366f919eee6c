import pytest

from cluster.autoscale.policies import DispatchLatency
from experts.errors import ConfigError


def test_grows_with_the_overshoot_at_most_doubling(fake_serve):
    serve = fake_serve(DispatchLatency(slo_ms=20, upscale_cooldown_s=0), target=2)
    assert serve.tick(p95_dispatch_ms=[21.0, 5.0]) == 3
    assert serve.tick(p95_dispatch_ms=[90.0, 90.0, 90.0]) == 6


def test_shrinks_one_at_a_time_and_only_far_below_the_slo(fake_serve):
    serve = fake_serve(DispatchLatency(slo_ms=20, downscale_cooldown_s=60), target=4)
    assert serve.tick(100, p95_dispatch_ms=[11.0] * 4) == 4
    assert serve.tick(100, p95_dispatch_ms=[9.0] * 4) == 3
    assert serve.tick(1, p95_dispatch_ms=[1.0] * 3) == 3
    assert serve.tick(60, p95_dispatch_ms=[1.0] * 3) == 2
    assert serve.tick(600, p95_dispatch_ms=[1.0]) == 2, "one replica is silent"


def test_latency_measured_while_replicas_start_moves_nothing(fake_serve):
    serve = fake_serve(DispatchLatency(slo_ms=20, upscale_cooldown_s=0), target=4)
    assert serve.tick(100, running=2, p95_dispatch_ms=[500.0, 500.0]) == 4


@pytest.mark.parametrize("kwargs", [{"slo_ms": 0}, {"slo_ms": 5, "shrink_below": 1}, {"slo_ms": 5, "max_growth": 1}])
def test_impossible_kwargs_are_refused(kwargs):
    with pytest.raises(ConfigError, match="policy DispatchLatency"):
        DispatchLatency(**kwargs)
