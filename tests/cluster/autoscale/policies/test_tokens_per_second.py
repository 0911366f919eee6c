import pytest

from cluster.autoscale.policies import TokensPerSecond
from experts.errors import ConfigError


def test_a_day_of_load_grows_and_shrinks_once_each(fake_serve):
    serve = fake_serve(TokensPerSecond(target_tokens_per_s=1000, upscale_cooldown_s=30, downscale_cooldown_s=300))
    ramp = [200, 800, 1050, 1090, 2900, 2950, 3050, 3100, 2900, 2890, 900, 880, 870]
    targets = [serve.tick(60, tokens_per_s=float(rate)) for rate in ramp for _ in range(10)]
    assert max(targets) == 3
    assert targets[-1] == 1
    assert serve.changes == 2


def test_capacity_follows_the_sum_over_replicas_not_their_mean(fake_serve):
    serve = fake_serve(TokensPerSecond(target_tokens_per_s=1000), target=2)
    assert serve.tick(1000, tokens_per_s=[2400.0, 100.0]) == 3


def test_target_must_be_positive():
    with pytest.raises(ConfigError, match="target_tokens_per_s"):
        TokensPerSecond(target_tokens_per_s=-5)
