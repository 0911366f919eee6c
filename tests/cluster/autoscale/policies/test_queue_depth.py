import pytest

from cluster.autoscale.policies import QueueDepth
from experts.errors import ConfigError


def test_follows_the_queue_up_and_down(fake_serve):
    serve = fake_serve(QueueDepth(target_queue_depth=8, upscale_cooldown_s=10, downscale_cooldown_s=60))
    assert serve.tick(queue_depth=6.0) == 1
    assert serve.tick(queue_depth=30.0) == 4
    assert serve.tick(queue_depth=2.0) == 4
    assert serve.tick(61, queue_depth=2.0) == 1
    assert serve.changes == 2


def test_no_report_holds_and_a_silent_replica_is_not_an_idle_one(fake_serve):
    serve = fake_serve(QueueDepth(target_queue_depth=8), target=3)
    assert serve.tick(1000) == 3
    assert serve.tick(1000, queue_depth=1.0, silent=1) == 3
    assert serve.tick(1000, queue_depth=80.0, silent=1) == 10


def test_reports_of_replicas_that_are_gone_do_not_count(fake_serve):
    serve = fake_serve(QueueDepth(target_queue_depth=8), target=1)
    assert serve.tick(1000, running=1, queue_depth=[4.0, 400.0]) == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"target_queue_depth": 0}, "target_queue_depth must be a number above 0, not 0"),
        ({"target_queue_depth": 4, "tolerance": 1}, "tolerance must be a number below 1"),
        ({"target_queue_depth": 4, "tolerance": -0.1}, "tolerance must be a number at least 0"),
    ],
)
def test_impossible_kwargs_are_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        QueueDepth(**kwargs)
