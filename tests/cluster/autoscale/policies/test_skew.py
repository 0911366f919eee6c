import pytest

from cluster.autoscale.policies import Skew
from experts.errors import ConfigError


def test_only_the_hot_group_grows(fake_serve):
    shares = {"hot": 2.8, "warm": 1.5, "cold": 0.2}
    targets = {
        name: fake_serve(Skew(max_load_share=1.5)).tick(load_share=[share], tokens_per_s=100.0)
        for name, share in shares.items()
    }
    assert targets == {"hot": 2, "warm": 1, "cold": 1}


def test_replicas_that_report_the_same_share_are_not_summed(fake_serve):
    serve = fake_serve(Skew(max_load_share=1.5), target=2)
    assert serve.tick(1000, load_share=[2.8, 2.8], tokens_per_s=100.0) == 2


def test_a_share_of_next_to_nothing_is_noise(fake_serve):
    serve = fake_serve(Skew(max_load_share=1.5, min_tokens_per_s=50), target=3)
    assert serve.tick(1000, load_share=[4.0] * 3, tokens_per_s=49.0) == 1


def test_a_share_below_even_cannot_be_the_bound():
    with pytest.raises(ConfigError, match="max_load_share must be a number at least 1"):
        Skew(max_load_share=0.9)
