"""What a CPU backend asks of a format for experts' matrices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch


class PackedMatrix(Protocol):
    """One matrix [O, I] and its bias in a format of its own; the plain weight is not kept."""

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes, and that a multiplication reads."""
        ...


class CpuFormat(Protocol):
    """Packs matrices, and multiplies rows with several of them."""

    def pack(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> PackedMatrix:
        """The matrix in this format. Raises ConfigError where the format cannot hold it."""
        ...

    def multiply(self, matrices: Sequence[Any], rows_RI: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """`rows @ weight.T + bias`: the first `counts[0]` rows with the first matrix, and so on. float32 [R, O].

        A row's result does not depend on the other rows.
        """
        ...


class FloatFormat:
    """A CpuFormat of matrices that can be called with float32 rows."""

    def __init__(self, pack: Callable[[torch.Tensor, torch.Tensor | None], PackedMatrix]) -> None:
        self.pack = pack

    def multiply(
        self,
        matrices: Sequence[Callable[[torch.Tensor], torch.Tensor]],
        rows_RI: torch.Tensor,
        counts: Sequence[int],
    ) -> torch.Tensor:
        """See CpuFormat.multiply."""
        if len(matrices) == 1:
            return matrices[0](rows_RI)
        parts = torch.split_with_sizes(rows_RI, list(counts))
        return torch.cat([matrix(part) for matrix, part in zip(matrices, parts, strict=True)])
