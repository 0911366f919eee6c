"""A float32 matrix in the layout that oneDNN multiplies fastest on this CPU. Lossless."""

from __future__ import annotations

import torch
from torch.nn import functional as F


class Float32Linear:
    """`rows @ weight.T + bias` with the weight reordered once; the plain copy is not kept."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> None:
        weight = weight_OI.float().contiguous()
        self.packed = bool(torch._C._has_mkldnn)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight.clone()
        self.bias = None if bias_O is None else bias_O.float()
        self.nbytes = weight.nbytes

    def __call__(self, rows_RI: torch.Tensor) -> torch.Tensor:
        """float32 [R, I] to float32 [R, O]."""
        if self.packed:
            out_RO: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows_RI, self.weight, self.bias, "none", [], "")
            return out_RO
        return F.linear(rows_RI, self.weight, self.bias)
