"""What a plan costs."""

from __future__ import annotations

from cluster.planner.plan import Plan


def dollars_per_million_tokens(plan: Plan, price_per_gpu_hour: float | None) -> float | None:
    """Price of a million output tokens at the planned rate, every GPU paid for; None without a price."""
    if price_per_gpu_hour is None or not plan.tokens_per_second:
        return None
    return plan.gpus * price_per_gpu_hour / 3600 / plan.tokens_per_second * 1e6
