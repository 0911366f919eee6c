"""What all policies share: cooldowns, and bounds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

from ray.serve.config import AutoscalingContext

from experts.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Cooldown around a policy's `wanted` replicas.

    A change of the target, by whomever, starts both cooldowns: no growth for `upscale_cooldown_s` seconds, no
    shrinking for `downscale_cooldown_s`. They come on top of Serve's own `upscale_delay_s` and
    `downscale_delay_s`, which ask how long a wish must last before it is granted.
    """

    upscale_cooldown_s: float = 15.0
    downscale_cooldown_s: float = 120.0

    def __post_init__(self) -> None:
        self.require_at_least(0, "upscale_cooldown_s", "downscale_cooldown_s")

    @abstractmethod
    def wanted(self, ctx: AutoscalingContext) -> int | None:
        """Replicas that the load asks for; None where nothing is known, which holds the target."""

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Serve's entry: (target replicas, state for the next call)."""
        target = ctx.target_num_replicas
        changed_at = ctx.policy_state.get("changed_at")
        if ctx.policy_state.get("target", target) != target:
            changed_at = ctx.current_time
        since_s = math.inf if changed_at is None else ctx.current_time - changed_at

        decision = target
        wanted = self.wanted(ctx)
        if wanted is not None:
            growing_too_soon = wanted > target and since_s < self.upscale_cooldown_s
            shrinking_too_soon = wanted < target and since_s < self.downscale_cooldown_s
            if not (growing_too_soon or shrinking_too_soon):
                decision = wanted
        decision = min(max(decision, ctx.capacity_adjusted_min_replicas), ctx.capacity_adjusted_max_replicas)
        return decision, {"target": target, "changed_at": changed_at}

    def require_at_least(self, bound: float, *names: str) -> None:
        """ConfigError unless each named field is a finite number of at least `bound`."""
        self._require(lambda value: value >= bound, f"at least {bound:g}", names)

    def require_above(self, bound: float, *names: str) -> None:
        """ConfigError unless each named field is a finite number above `bound`."""
        self._require(lambda value: value > bound, f"above {bound:g}", names)

    def require_below(self, bound: float, *names: str) -> None:
        """ConfigError unless each named field is a finite number below `bound`."""
        self._require(lambda value: value < bound, f"below {bound:g}", names)

    def _require(self, holds: Any, what: str, names: tuple[str, ...]) -> None:
        assert set(names) <= {field.name for field in fields(self)}
        for name in names:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and holds(value)):
                raise ConfigError(f"policy {type(self).__name__}: {name} must be a number {what}, not {value!r}")
