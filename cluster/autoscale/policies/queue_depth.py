"""Scale by the calls that a group has accepted and not yet answered."""

from __future__ import annotations

from dataclasses import dataclass

from ray.serve.config import AutoscalingContext

from cluster.autoscale.policies.hysteresis import replicas_for
from cluster.autoscale.policies.policy import Policy
from cluster.autoscale.policies.reports import read_reports


@dataclass(frozen=True, kw_only=True)
class QueueDepth(Policy):
    """Keeps `queue_depth`, summed over replicas, at `target_queue_depth` per replica."""

    target_queue_depth: float
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self.require_above(0, "target_queue_depth")
        self.require_at_least(0, "tolerance")
        self.require_below(1, "tolerance")

    def wanted(self, ctx: AutoscalingContext) -> int | None:
        depth = read_reports(ctx, "queue_depth")
        if not depth.values:
            return None
        target = ctx.target_num_replicas
        wanted = replicas_for(sum(depth.values) / self.target_queue_depth, target, self.tolerance)
        return depth.hold_if_silent(wanted, target)
