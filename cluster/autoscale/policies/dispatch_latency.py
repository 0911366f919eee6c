"""Scale by the time that calls spend in a group, against an SLO."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ray.serve.config import AutoscalingContext

from cluster.autoscale.policies.policy import Policy
from cluster.autoscale.policies.reports import read_reports


@dataclass(frozen=True, kw_only=True)
class DispatchLatency(Policy):
    """Keeps the worst replica's `p95_dispatch_ms` between `shrink_below * slo_ms` and `slo_ms`.

    Latency is not proportional to load, so growth follows the overshoot but at most by the factor
    `max_growth` a step, and shrinking goes one replica at a time. While replicas start or stop, the measured
    latency belongs to another number of replicas than the target: then the target stands.
    """

    slo_ms: float
    shrink_below: float = 0.5
    max_growth: float = 2.0

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self.require_above(0, "slo_ms", "shrink_below")
        self.require_above(1, "max_growth")
        self.require_below(1, "shrink_below")

    def wanted(self, ctx: AutoscalingContext) -> int | None:
        target: int = ctx.target_num_replicas
        latency = read_reports(ctx, "p95_dispatch_ms")
        if not latency.values or ctx.current_num_replicas != target:
            return None
        worst_ms = max(latency.values)
        if worst_ms > self.slo_ms:
            return max(target + 1, math.floor(target * min(worst_ms / self.slo_ms, self.max_growth)))
        if worst_ms < self.slo_ms * self.shrink_below and latency.complete:
            return max(1, target - 1)
        return target
