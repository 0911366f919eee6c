"""How a CPU backend holds one matrix: what every format offers, and the formats by their names."""

from __future__ import annotations

from typing import Protocol

import torch


class CpuLinear(Protocol):
    """`rows @ weight.T + bias` with the weight in a format of its own; the plain weight is not kept.

    nbytes: bytes that the weight takes, and that a multiplication reads
    """

    nbytes: int

    def __call__(self, rows_RI: torch.Tensor) -> torch.Tensor:
        """float32 [R, I] to float32 [R, O]. A row's result does not depend on the other rows."""
        ...
