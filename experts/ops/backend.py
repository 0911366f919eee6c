"""The seam between a shard and the arithmetic of one device."""

from __future__ import annotations

from typing import Protocol

import torch

from experts.errors import ConfigError
from experts.ops.cpu_backend import CpuBackend
from experts.spec import ExpertSpec, ExpertWeights


class ExpertBackend(Protocol):
    """Holds the weights of numbered slots on one device and runs rows through them.

    A slot is one expert of one layer; slots of all layers share one numbering. Calls of `forward` may come
    from any thread, one at a time; `load` and `free` may run beside them for slots that no call names.
    """

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def load(self, slot: int, weights: ExpertWeights) -> None:
        """Take one expert's weights (any dtype, on CPU) into `slot`, in the backend's own format."""
        ...

    def free(self, slot: int) -> None:
        """Forget `slot`."""
        ...

    def use_threads(self, num_threads: int) -> None:
        """Let calls from now on use so many cores of this machine; without effect on a GPU."""
        ...

    def forward(
        self,
        hidden_TH: torch.Tensor,
        slots_S: torch.Tensor,
        offsets_S1: torch.Tensor,
        token_rows_R: torch.Tensor,
        weights_R: torch.Tensor,
    ) -> torch.Tensor:
        """Weighted sum of experts for each token: `partial_TH`, float32, on `hidden_TH`'s device.

        Rows `offsets_S1[s]:offsets_S1[s+1]` go through slot `slots_S[s]`; routed row r reads
        `hidden_TH[token_rows_R[r]]` and adds `weights_R[r] * expert(row)`, in ascending r, to the same row of
        the result. Slots, offsets and rows are int32, weights float32, all on CPU or on `hidden_TH`'s device.
        """
        ...


def build_backend(
    spec: ExpertSpec, *, device: torch.device, dtype: torch.dtype, quantization: str, num_threads: int
) -> ExpertBackend:
    """The backend for `device`.

    dtype: what a GPU computes in; CPUs compute in float32 whatever the model's dtype.
    quantization: `none`, or how the device holds weights (`model.quantization` of mesh.yaml).
    num_threads: cores that one call may use on CPU.

    Raises ConfigError where the device does not have `quantization`.
    """
    if device.type == "cpu":
        return CpuBackend(spec, quantization=quantization, num_threads=num_threads)
    if device.type == "cuda":
        # Triton is imported only where there is a card for it.
        from experts.ops.triton_backend import TritonBackend

        return TritonBackend(spec, device=device, dtype=dtype, quantization=quantization)
    raise ConfigError(f"experts.device: no backend for {device.type!r}; use cpu or cuda")
