from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve.config import AutoscalingContext


@dataclass
class FakeServe:
    """Serve's part around a policy, with a clock that the test turns: applies each decision at once."""

    policy: Callable[[AutoscalingContext], tuple[float, dict[str, Any]]]
    target: int = 1
    now: float = 1_000_000.0
    bounds: tuple[int, int] = (1, 16)
    state: dict[str, Any] = field(default_factory=dict)
    changes: int = 0

    def tick(
        self,
        seconds: float = 1.0,
        *,
        running: int | None = None,
        silent: int = 0,
        **stats: float | list[float],
    ) -> int:
        """One decision, `seconds` after the last; one number is shared out over the replicas that speak."""
        self.now += seconds
        running = self.target if running is None else running
        replicas = [f"replica-{index}" for index in range(running)]
        metrics: dict[str, Mapping[str, float]] = {}
        for name, value in stats.items():
            values = value if isinstance(value, list) else [value / max(1, running - silent)] * (running - silent)
            metrics[name] = dict(zip(replicas, values, strict=False))
        context = AutoscalingContext(
            deployment_id=None,
            deployment_name="experts-0",
            app_name="expertmesh",
            current_num_replicas=running,
            target_num_replicas=self.target,
            running_replicas=replicas,
            total_num_requests=0.0,
            total_queued_requests=0.0,
            aggregated_metrics=lambda: metrics,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self.bounds[0],
            capacity_adjusted_max_replicas=self.bounds[1],
            policy_state=dict(self.state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now,
            config=None,
        )
        target, self.state = self.policy(context)
        assert isinstance(target, int)
        self.changes += target != self.target
        self.target = target
        return target


@pytest.fixture
def fake_serve() -> type[FakeServe]:
    return FakeServe
