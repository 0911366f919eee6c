"""What /health says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupHealth:
    """One expert group. `reason` says why it is away; None where it is alive."""

    group: int
    alive: bool
    reason: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """The whole system: every expert group, and `problems` of the rest (a dead rebalancer, an engine)."""

    groups: tuple[GroupHealth, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems and all(group.alive for group in self.groups)

    def as_json(self) -> dict[str, Any]:
        return {"status": "ok" if self.ok else "unavailable", **asdict(self)}
