from dataclasses import dataclass

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.config import AutoscalingPolicy

from cluster.autoscale import policies
from cluster.autoscale.policies import Policy
from experts.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Wants(Policy):
    """Wants whatever the test last wrote into `answers`."""

    answers: list

    def wanted(self, ctx):
        return self.answers[-1]


def test_growth_waits_for_its_cooldown_after_a_change(fake_serve):
    policy = Wants(answers=[2], upscale_cooldown_s=30, downscale_cooldown_s=100)
    serve = fake_serve(policy)
    assert serve.tick() == 2
    policy.answers.append(5)
    assert serve.tick(1) == 2
    assert serve.tick(29.5) == 2
    assert serve.tick(0.6) == 5


def test_shrinking_waits_for_its_own_cooldown(fake_serve):
    policy = Wants(answers=[4], upscale_cooldown_s=0, downscale_cooldown_s=100)
    serve = fake_serve(policy)
    assert serve.tick() == 4
    policy.answers.append(1)
    assert serve.tick(1) == 4
    assert serve.tick(99) == 4
    assert serve.tick(1) == 1


def test_a_change_by_someone_else_starts_the_cooldown(fake_serve):
    policy = Wants(answers=[2], upscale_cooldown_s=0, downscale_cooldown_s=100)
    serve = fake_serve(policy, target=2)
    assert serve.tick() == 2
    serve.target = 6
    assert serve.tick(500) == 6
    assert serve.tick(99) == 6
    assert serve.tick(1) == 2


def test_nothing_known_holds_the_target_and_bounds_hold_everything(fake_serve):
    policy = Wants(answers=[None])
    serve = fake_serve(policy, target=3, bounds=(1, 4))
    assert serve.tick() == 3
    policy.answers.append(99)
    assert serve.tick() == 4


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "15", True, None])
def test_a_cooldown_must_be_a_finite_number(value):
    with pytest.raises(ConfigError, match="upscale_cooldown_s must be a number at least 0"):
        Wants(answers=[1], upscale_cooldown_s=value)


KWARGS = {
    "DispatchLatency": {"slo_ms": 20},
    "Highest": {"policies": [{"QueueDepth": {"target_queue_depth": 4}}]},
    "QueueDepth": {"target_queue_depth": 4},
    "Schedule": {"windows": [{"start": "08:00", "end": "20:00", "replicas": 2}]},
    "Skew": {},
    "TokensPerSecond": {"target_tokens_per_s": 100},
}


@pytest.mark.parametrize("name", sorted(set(policies.__all__) - {"Policy"}))
def test_serve_carries_every_policy_by_name_through_its_pickle(name, fake_serve):
    config = AutoscalingPolicy(policy_function=f"cluster.autoscale.policies:{name}", policy_kwargs=KWARGS[name])
    policy = _resolve_policy_callable(
        AutoscalingPolicy.from_serialized_policy_def(config.model_dump(), config.get_serialized_policy_def())
    )
    assert policy == getattr(policies, name)(**KWARGS[name]) or repr(policy) == repr(
        getattr(policies, name)(**KWARGS[name])
    )
    serve = fake_serve(policy, target=2)
    stats = {
        "tokens_per_s": 150.0,
        "queue_depth": 6.0,
        "p95_dispatch_ms": [15.0, 12.0],
        "load_share": [2.0, 2.0],
    }
    assert serve.tick(**stats) in (1, 2)
