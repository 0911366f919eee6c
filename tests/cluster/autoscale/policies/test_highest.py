import pytest

from cluster.autoscale.policies import Highest
from experts.errors import ConfigError

ALWAYS_TWO = {"Schedule": {"windows": [{"start": "00:00", "end": "23:59", "replicas": 2}], "otherwise": 2}}


def test_load_above_a_floor_by_the_clock(fake_serve):
    policy = Highest(policies=[ALWAYS_TWO, {"TokensPerSecond": {"target_tokens_per_s": 100}}])
    serve = fake_serve(policy)
    assert serve.tick(1000, tokens_per_s=10.0) == 2
    assert serve.tick(1, tokens_per_s=390.0) == 2, "the start is younger than the cooldown"
    assert serve.tick(1000, tokens_per_s=390.0) == 4
    assert serve.tick(1, tokens_per_s=10.0) == 4, "the growth is younger than the cooldown"
    assert serve.tick(1000, tokens_per_s=10.0) == 2


def test_a_policy_that_knows_nothing_lets_the_others_raise_but_not_lower(fake_serve):
    policy = Highest(policies=[ALWAYS_TWO, {"QueueDepth": {"target_queue_depth": 4}}])
    assert fake_serve(policy, target=1).tick(1000) == 2
    assert fake_serve(policy, target=5).tick(1000) == 5


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ([], "policies must be a list"),
        ([{"Nonsense": {}}], r"policies\[0\] must name one of"),
        ([{"Highest": {"policies": []}}], r"policies\[0\] must name one of"),
        ([{"Skew": {"max_load_shares": 2}}], r"policies\[0\].Skew: .*max_load_shares"),
        ([{"Skew": {"upscale_cooldown_s": 2}}], "cooldowns: they go to Highest"),
    ],
)
def test_impossible_kwargs_are_refused(policies, message):
    with pytest.raises(ConfigError, match=message):
        Highest(policies=policies)
