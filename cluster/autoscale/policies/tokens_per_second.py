"""Scale by the rows that a group computes per second."""

from __future__ import annotations

from dataclasses import dataclass

from ray.serve.config import AutoscalingContext

from cluster.autoscale.policies.hysteresis import replicas_for
from cluster.autoscale.policies.policy import Policy
from cluster.autoscale.policies.reports import read_reports


@dataclass(frozen=True, kw_only=True)
class TokensPerSecond(Policy):
    """Keeps `tokens_per_s`, summed over replicas, at `target_tokens_per_s` per replica.

    The target is what one replica should do, not the most it can: a saturated group cannot report more than
    it computes, so the target must lie below saturation, or growth stops at the first replica.
    """

    target_tokens_per_s: float
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self.require_above(0, "target_tokens_per_s")
        self.require_at_least(0, "tolerance")
        self.require_below(1, "tolerance")

    def wanted(self, ctx: AutoscalingContext) -> int | None:
        rate = read_reports(ctx, "tokens_per_s")
        if not rate.values:
            return None
        target = ctx.target_num_replicas
        wanted = replicas_for(sum(rate.values) / self.target_tokens_per_s, target, self.tolerance)
        return rate.hold_if_silent(wanted, target)
