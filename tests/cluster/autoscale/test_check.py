import pytest

from cluster.autoscale.check import check_autoscaling
from experts.errors import ConfigError

QUEUE_DEPTH = "cluster.autoscale.policies:QueueDepth"


def policy(**kwargs):
    return {"policy": {"policy_function": QUEUE_DEPTH, "policy_kwargs": kwargs}}


def test_what_serve_can_follow_is_accepted():
    check_autoscaling({}, "autoscaling.engine")
    check_autoscaling({"min_replicas": 1, "max_replicas": 4, **policy(target_queue_depth=8)}, "here", from_zero=False)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"max_replica": 4}, "here: unknown key 'max_replica'; did you mean 'max_replicas'?"),
        ({"min_replicas": 4, "max_replicas": 2}, r"here: .*max_replicas \(2\) must be greater"),
        ({"max_replicas": "many"}, "here.max_replicas"),
        ({"policy": "QueueDepth"}, "here.policy must hold policy_function and policy_kwargs"),
        (
            {"policy": {"function": QUEUE_DEPTH}},
            "here.policy: unknown key 'function'; did you mean 'policy_function'",
        ),
        (
            {"policy": {"policy_function": "no.such.module:Policy"}},
            "'no.such.module:Policy' cannot be imported",
        ),
        (
            {"policy": {"policy_function": "cluster.autoscale.policies:Nope"}},
            "policies:Nope' cannot be imported",
        ),
        (policy(target_depth=8), "here.policy.policy_kwargs: .*target_queue_depth"),
        (policy(target_queue_depth=-8), "here.policy.policy_kwargs: policy QueueDepth: target_queue_depth"),
        (
            {
                "policy": {
                    "policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy",
                    "policy_kwargs": {"target": 2},
                }
            },
            "policy is a function",
        ),
        ({"smoothing_factor": 0.5, "metrics_interval_s": 5}, "here: .*deprecated"),
    ],
)
def test_what_serve_would_silently_not_follow_is_refused(section, message):
    with pytest.raises(ConfigError, match=message):
        check_autoscaling(section, "here")


def test_a_group_may_not_shrink_to_nothing():
    with pytest.raises(ConfigError, match=r"autoscaling\.experts\.min_replicas must be at least 1"):
        check_autoscaling({"min_replicas": 0, "max_replicas": 2}, "autoscaling.experts", from_zero=False)
