"""How a grouped matmul is cut into tiles."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TileConfig:
    """One way to run a grouped matmul.

    kernel:            `prefill` (persistent, rows first) or `decode` (weights first, one program a tile)
    rows:              routed rows a tile, at most one expert's
    columns:           output columns a tile
    depth:             columns of the operands that one step multiplies
    warps, stages:     as Triton's num_warps, num_stages
    band:              row tiles that run together for L2's sake (prefill)
    programs_per_sm:   of the persistent grid (prefill)
    """

    kernel: Literal["prefill", "decode"]
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    band: int = 8
    programs_per_sm: int = 1

    def to_json(self) -> dict[str, Any]:
        """Field by field, for the cache."""
        return asdict(self)
