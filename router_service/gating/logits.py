"""The linear layer that every gate starts with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from experts.errors import RequestError
from experts.ops.packed_matmul import PackedMatrix, pack_exactly, packed_matmul


class GateLogits:
    """Float32 logits_TE of hidden_TH in any float dtype, on the device of `weight_EH`.

    packed: the layer for the CPU; None on a GPU
    """

    def __init__(self, weight_EH: torch.Tensor) -> None:
        self._width = weight_EH.shape[1]
        self._weight_EH = weight_EH.detach().float()
        self.packed: PackedMatrix | None = pack_exactly(self._weight_EH) if weight_EH.device.type == "cpu" else None

    def __call__(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """Raises RequestError where hidden states are of another width."""
        if hidden_TH.shape[-1] != self._width:
            raise RequestError(f"hidden: {hidden_TH.shape[-1]} wide, the gate takes {self._width}", "hidden")
        if self.packed is None:
            return F.linear(hidden_TH.float(), self._weight_EH)
        return packed_matmul(self.packed, hidden_TH.float())
