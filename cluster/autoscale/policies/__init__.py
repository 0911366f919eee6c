"""Autoscaling policies, named in YAML as `policy_function: cluster.autoscale.policies:<Name>`.

Each is a class because Serve hands `policy_kwargs` to a class's constructor and ignores them for a function.
An instance
is frozen and pure: it decides from Serve's AutoscalingContext alone, and what it remembers is in the state
that it returns.

QueueDepth        calls accepted and not yet answered, against a target per replica
TokensPerSecond   rows computed per second, against what one replica should do
DispatchLatency   p95 of a call's time in the group, against an SLO
Skew              this group's load against the mean over groups: only hot groups grow
Schedule          replicas by weekday and time of day
Highest           the largest answer of several of these
"""

from cluster.autoscale.policies.dispatch_latency import DispatchLatency
from cluster.autoscale.policies.highest import Highest
from cluster.autoscale.policies.policy import Policy
from cluster.autoscale.policies.queue_depth import QueueDepth
from cluster.autoscale.policies.schedule import Schedule
from cluster.autoscale.policies.skew import Skew
from cluster.autoscale.policies.tokens_per_second import TokensPerSecond

__all__ = ["DispatchLatency", "Highest", "Policy", "QueueDepth", "Schedule", "Skew", "TokensPerSecond"]
