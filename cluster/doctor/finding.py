"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """`fail` keeps a model from being served, `warn` may. `todo` says what to do, empty where nothing is."""

    check: str
    status: Status
    found: str
    todo: str = ""
