"""A float32 matrix in the layout that oneDNN multiplies fastest on this CPU."""

from __future__ import annotations

import torch
from torch.nn import functional as F


class Float32Linear:
    """Loses nothing."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        weight = weight_OI.float().contiguous()
        self._packed = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._packed else weight
        self._bias = None if bias_O is None else bias_O.float()
        self.nbytes = weight.nbytes

    def __call__(self, rows_RI: torch.Tensor) -> torch.Tensor:
        """float32 [R, I] to float32 [R, O]."""
        if not self._packed:
            return F.linear(rows_RI, self._weight, self._bias)
        out_RO: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            rows_RI, self._weight, self._bias, "none", [], ""
        )
        return out_RO
