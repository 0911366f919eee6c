"""Reading what replicas report through `record_autoscaling_stats`."""

from __future__ import annotations

from dataclasses import dataclass

from ray.serve.config import AutoscalingContext


@dataclass(frozen=True, kw_only=True, slots=True)
class Reports:
    """One statistic of the running replicas.

    values:   of those that reported it, averaged by Serve over `look_back_period_s`
    complete: every running replica reported, and there is at least one
    """

    values: tuple[float, ...]
    complete: bool

    def hold_if_silent(self, wanted: int, target: int) -> int:
        """`wanted`, but not below `target` while a replica is silent: silence is not idleness."""
        return wanted if self.complete else max(wanted, target)


def read_reports(ctx: AutoscalingContext, statistic: str) -> Reports:
    """The statistic's values; of no replicas where none has reported yet."""
    by_replica = (ctx.aggregated_metrics or {}).get(statistic) or {}
    values = tuple(by_replica[replica] for replica in ctx.running_replicas if replica in by_replica)
    return Reports(values=values, complete=bool(values) and len(values) == len(ctx.running_replicas))
