"""Experts on CPU cores: weights packed at load, arithmetic in float32 whatever the checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from experts.errors import ConfigError
from experts.ops.activations import activate
from experts.ops.cpu_float32 import Float32Linear
from experts.ops.unpermute import unpermute
from experts.spec import ExpertSpec, ExpertWeights

BLOCK = 128

Linear = Callable[[torch.Tensor], torch.Tensor]

SCHEMES: Mapping[str, Callable[[torch.Tensor, torch.Tensor | None], Linear]] = {
    "none": Float32Linear,
}


class CpuBackend:
    """An ExpertBackend (see backend.py) for CPU.

    quantization: a key of SCHEMES.
    num_threads: cores that one call may use.
    """

    device = torch.device("cpu")

    def __init__(self, spec: ExpertSpec, *, quantization: str = "none", num_threads: int = 1) -> None:
        if quantization not in SCHEMES:
            raise ConfigError(
                f"model.quantization: {quantization!r} needs a GPU; on CPU use one of {', '.join(SCHEMES)}"
            )
        self._spec = spec
        self._pack = SCHEMES[quantization]
        self._num_threads = num_threads
        self._slots: dict[int, tuple[Linear, Linear]] = {}

    def load(self, slot: int, weights: ExpertWeights) -> None:
        """Pack one expert; float8 weights with block scales are widened first."""
        up = _widen(weights.up_2IH, weights.up_scale)
        down = _widen(weights.down_HI, weights.down_scale)
        self._slots[slot] = (self._pack(up, weights.up_bias_2I), self._pack(down, weights.down_bias_H))

    def free(self, slot: int) -> None:
        """Forget `slot`."""
        del self._slots[slot]

    def forward(
        self,
        hidden_TH: torch.Tensor,
        slots_S: torch.Tensor,
        offsets_S1: torch.Tensor,
        token_rows_R: torch.Tensor,
        weights_R: torch.Tensor,
    ) -> torch.Tensor:
        """See ExpertBackend.forward."""
        rows_RH = hidden_TH.float()[token_rows_R]
        out_RH = torch.empty_like(rows_RH)
        offsets = offsets_S1.tolist()
        for slot, start, end in zip(slots_S.tolist(), offsets, offsets[1:], strict=False):
            up, down = self._slots[slot]
            out_RH[start:end] = down(activate(up(rows_RH[start:end]), self._spec))
        return unpermute(out_RH, token_rows_R, weights_R, len(hidden_TH))


def _widen(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        return weight
    rows, columns = weight.shape
    scale = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return weight.float() * scale
