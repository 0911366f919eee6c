"""The largest answer of several policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

from cluster.autoscale.policies.dispatch_latency import DispatchLatency
from cluster.autoscale.policies.policy import Policy
from cluster.autoscale.policies.queue_depth import QueueDepth
from cluster.autoscale.policies.schedule import Schedule
from cluster.autoscale.policies.skew import Skew
from cluster.autoscale.policies.tokens_per_second import TokensPerSecond
from experts.errors import ConfigError

_POLICIES: dict[str, type[Policy]] = {
    policy.__name__: policy for policy in (DispatchLatency, QueueDepth, Schedule, Skew, TokensPerSecond)
}
_COOLDOWNS = {"upscale_cooldown_s", "downscale_cooldown_s"}


@dataclass(frozen=True, kw_only=True)
class Highest(Policy):
    """As many replicas as the most demanding of `policies` wants, e.g. a schedule's floor under a load
    policy.

    policies: mappings of one name to its kwargs, such as `{Schedule: {windows: [...]}}`; cooldowns are this
        policy's own A policy that knows nothing holds the target: the others may raise it, none may lower it.
    """

    policies: Sequence[Mapping[str, Mapping[str, Any]]]

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        if isinstance(self.policies, str) or not isinstance(self.policies, Sequence) or not self.policies:
            raise ConfigError(
                "policy Highest: policies must be a list such as [{QueueDepth: {...}}, {Schedule: {...}}]"
            )
        for index in range(len(self.policies)):
            self._policy(index)

    def wanted(self, ctx: AutoscalingContext) -> int | None:
        answers = [self._policy(index).wanted(ctx) for index in range(len(self.policies))]
        return max(ctx.target_num_replicas if answer is None else answer for answer in answers)

    def _policy(self, index: int) -> Policy:
        raw, where = self.policies[index], f"policies[{index}]"
        if not isinstance(raw, Mapping) or len(raw) != 1 or not set(raw) <= set(_POLICIES):
            known = ", ".join(_POLICIES)
            raise ConfigError(f"policy Highest: {where} must name one of {known}, with its kwargs, and is {raw!r}")
        ((name, kwargs),) = raw.items()
        if not isinstance(kwargs, Mapping) or _COOLDOWNS & set(kwargs):
            raise ConfigError(f"policy Highest: {where}.{name} must hold kwargs, without cooldowns: they go to Highest")
        try:
            return _POLICIES[name](**kwargs)
        except TypeError as error:
            raise ConfigError(f"policy Highest: {where}.{name}: {error}") from error
