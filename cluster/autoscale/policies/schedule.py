"""Scale by the clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from ray.serve.config import AutoscalingContext

from cluster.autoscale.policies.policy import Policy
from experts.errors import ConfigError

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_KEYS = {"days", "start", "end", "replicas"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """From `start` to `end`, wall-clock time; an end that is not after the start is on the following day.

    days: weekdays on which the window starts, Monday is 0
    """

    days: frozenset[int]
    start: time
    end: time
    replicas: int

    def holds(self, now: datetime) -> bool:
        """Whether `now`, a local time, is inside."""
        at = now.time().replace(tzinfo=None)
        if self.start < self.end:
            return now.weekday() in self.days and self.start <= at < self.end
        yesterday = (now - timedelta(days=1)).weekday()
        return (now.weekday() in self.days and at >= self.start) or (yesterday in self.days and at < self.end)


@dataclass(frozen=True, kw_only=True)
class Schedule(Policy):
    """The largest `replicas` of the windows that hold now, else `otherwise`.

    windows: mappings with `days` (names such as `mon`, default every day), `start` and `end` ("HH:MM") and
        `replicas`
    timezone: IANA name; a window follows the wall clock through changes of daylight saving time
    A clock needs no cooldown; give Serve's `upscale_delay_s: 0` as well, or the window opens late.
    """

    windows: Sequence[Mapping[str, Any]]
    timezone: str = "UTC"
    otherwise: int = 1
    upscale_cooldown_s: float = 0.0
    downscale_cooldown_s: float = 0.0

    def __post_init__(self) -> None:
        Policy.__post_init__(self)
        self._replicas(self.otherwise, "otherwise")
        try:
            ZoneInfo(self.timezone)
        except (ZoneInfoNotFoundError, ValueError, TypeError) as error:
            raise ConfigError(f"policy Schedule: timezone {self.timezone!r} is no known IANA name") from error
        if isinstance(self.windows, str) or not isinstance(self.windows, Sequence) or not self.windows:
            raise ConfigError("policy Schedule: windows must be a list of {days, start, end, replicas}")
        for index in range(len(self.windows)):
            self._window(index)

    def wanted(self, ctx: AutoscalingContext) -> int | None:
        now = datetime.fromtimestamp(ctx.current_time, ZoneInfo(self.timezone))
        windows = (self._window(index) for index in range(len(self.windows)))
        return max((window.replicas for window in windows if window.holds(now)), default=self.otherwise)

    def _window(self, index: int) -> Window:
        raw, where = self.windows[index], f"windows[{index}]"
        if not isinstance(raw, Mapping) or not _KEYS - {"days"} <= set(raw) <= _KEYS:
            raise ConfigError(f"policy Schedule: {where} needs start, end and replicas, may have days, and has {raw!r}")
        days = raw.get("days", _DAYS)
        if isinstance(days, str) or not isinstance(days, Sequence) or not days or not set(days) <= set(_DAYS):
            raise ConfigError(f"policy Schedule: {where}.days must be a list of {', '.join(_DAYS)}, not {days!r}")
        return Window(
            days=frozenset(_DAYS.index(day) for day in days),
            start=self._time(raw["start"], f"{where}.start"),
            end=self._time(raw["end"], f"{where}.end"),
            replicas=self._replicas(raw["replicas"], f"{where}.replicas"),
        )

    def _time(self, value: Any, where: str) -> time:
        try:
            return datetime.strptime(value, "%H:%M").time()
        except (TypeError, ValueError) as error:
            # YAML reads an unquoted 20:00 as the base-60 number 1200.
            raise ConfigError(f'policy Schedule: {where} must be a quoted "HH:MM", not {value!r}') from error

    def _replicas(self, value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"policy Schedule: {where} must be a whole number of at least 1, not {value!r}")
        return value
