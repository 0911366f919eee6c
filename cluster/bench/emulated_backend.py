"""What a card's kernels compute in a quantisation scheme, in plain torch on CPU: the same roundings, float32 sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from experts.ops.activations import activate
from experts.ops.unpermute import unpermute
from experts.quant.fp8_block import Fp8Block
from experts.quant.fp8_row import Fp8Row
from experts.quant.scheme import GROUP, QuantisedWeight, Scheme, pad_columns
from experts.spec import ExpertSpec, ExpertWeights

# Schemes whose kernels also quantise the rows that come in, and how many columns share a scale; None: all of a row.
_ACTIVATION_GROUPS: Mapping[str, int | None] = {"fp8": None, "fp8_block": GROUP}


class EmulatedBackend:
    """An ExpertBackend (see experts/ops/backend.py).

    dtype: what the card computes in; rows are rounded to it before and after either projection, float32 for no
           rounding at all
    """

    device = torch.device("cpu")

    def __init__(self, spec: ExpertSpec, scheme: Scheme, *, dtype: torch.dtype) -> None:
        self._spec = spec
        self._scheme = scheme
        self._dtype = dtype
        self._slots: dict[int, ExpertWeights] = {}

    def load(self, slot: int, weights: ExpertWeights) -> None:
        """Hold what the codes stand for."""
        self._slots[slot] = ExpertWeights(
            # Gate and up apart: a block of scales must not straddle them.
            up_2IH=self._round_weight(weights.up_2IH, weights.up_scale, matrices=2 if self._spec.gated else 1),
            down_HI=self._round_weight(weights.down_HI, weights.down_scale, matrices=1),
            up_bias_2I=None if weights.up_bias_2I is None else weights.up_bias_2I.float(),
            down_bias_H=None if weights.down_bias_H is None else weights.down_bias_H.float(),
        )

    def free(self, slot: int) -> None:
        """Forget `slot`."""
        del self._slots[slot]

    def use_threads(self, num_threads: int) -> None:
        """See ExpertBackend.use_threads."""

    def forward(
        self,
        hidden_TH: torch.Tensor,
        slots_S: torch.Tensor,
        offsets_S1: torch.Tensor,
        token_rows_R: torch.Tensor,
        weights_R: torch.Tensor,
    ) -> torch.Tensor:
        """See ExpertBackend.forward."""
        rows_RH = self._round_rows(hidden_TH)[token_rows_R]
        out_RH = torch.empty(len(token_rows_R), self._spec.hidden_size)
        offsets = offsets_S1.tolist()
        for slot, start, end in zip(slots_S.tolist(), offsets, offsets[1:], strict=False):
            weights = self._slots[slot]
            inner = activate(F.linear(rows_RH[start:end], weights.up_2IH, weights.up_bias_2I), self._spec)
            out_RH[start:end] = F.linear(self._round_rows(inner), weights.down_HI, weights.down_bias_H)
        return unpermute(out_RH.to(self._dtype).float(), token_rows_R, weights_R, len(hidden_TH))

    def _round_weight(self, weight: torch.Tensor, scale: torch.Tensor | None, *, matrices: int) -> torch.Tensor:
        if scale is not None:
            weight = Fp8Block().dequantise(QuantisedWeight(weight, scale.float()), weight.shape[1])
        held = [self._scheme.quantise(matrix) for matrix in weight.chunk(matrices)]
        return torch.cat([self._scheme.dequantise(matrix, weight.shape[1]) for matrix in held])

    def _round_rows(self, rows_RK: torch.Tensor) -> torch.Tensor:
        rows_RK = rows_RK.to(self._dtype).float()
        if self._scheme.name not in _ACTIVATION_GROUPS:
            return rows_RK
        group = _ACTIVATION_GROUPS[self._scheme.name]
        padded = rows_RK if group is None else pad_columns(rows_RK, group)
        grouped = padded if group is None else padded.view(-1, group)
        # A scale for every row of `grouped`, which is what this scheme does.
        rounded = Fp8Row().dequantise(Fp8Row().quantise(grouped), grouped.shape[1])
        return rounded.view(padded.shape)[:, : rows_RK.shape[1]]
