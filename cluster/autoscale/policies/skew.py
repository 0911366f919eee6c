"""Scale only the groups that are hotter than the rest."""

from __future__ import annotations

from dataclasses import dataclass

from ray.serve.config import AutoscalingContext

from cluster.autoscale.policies.hysteresis import replicas_for
from cluster.autoscale.policies.policy import Policy
from cluster.autoscale.policies.reports import read_reports


@dataclass(frozen=True, kw_only=True)
class Skew(Policy):
    """A group whose load exceeds `max_load_share` times the mean over groups gets replicas until each is
    below it.

    `load_share` is reported alike by all replicas of a group: the group's tokens over the mean over groups.
    Below `min_tokens_per_s`, summed over the group's replicas, a share is noise and asks for one replica.
    """

    max_load_share: float = 1.5
    min_tokens_per_s: float = 0.0
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self.require_at_least(1, "max_load_share")
        self.require_at_least(0, "min_tokens_per_s", "tolerance")
        self.require_below(1, "tolerance")

    def wanted(self, ctx: AutoscalingContext) -> int | None:
        share = read_reports(ctx, "load_share")
        rate = read_reports(ctx, "tokens_per_s")
        if not share.values or not rate.values:
            return None
        busy = sum(rate.values) >= self.min_tokens_per_s
        target = ctx.target_num_replicas
        load = max(share.values) / self.max_load_share if busy else 0.0
        return rate.hold_if_silent(replicas_for(load, target, self.tolerance), target)
