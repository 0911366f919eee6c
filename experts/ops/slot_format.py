"""How one expert is written into a slot: projections interleaved, padded and quantised."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from experts.ops.projection import Projection
from experts.ops.slots import Part, lay_out
from experts.quant.fp8_block import Fp8Block
from experts.quant.scheme import GROUP, QuantisedWeight, Scheme, pad_columns, stored_columns
from experts.spec import ExpertSpec, ExpertWeights


class SlotFormat:
    """A slot's parts, and the projections that the kernels find in them.

    activation: the kernels' name of spec.activation
    """

    def __init__(self, spec: ExpertSpec, scheme: Scheme, activation: str) -> None:
        self._spec = spec
        self.scheme = scheme
        halves = 2 if spec.gated else 1
        sizes = {
            "up": (halves * spec.intermediate_size, spec.hidden_size),
            "down": (spec.hidden_size, spec.intermediate_size),
        }
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, (rows, columns) in sizes.items():
            parts[name] = (scheme.codes_shape(rows, columns), scheme.codes_dtype)
            matrices = halves if name == "up" else 1
            scale_shape = scheme.scale_shape(rows // matrices, columns)
            if scale_shape is not None:
                parts[f"{name}_scale"] = ((matrices * scale_shape[0], *scale_shape[1:]), torch.float32)
            if spec.bias:
                parts[f"{name}_bias"] = ((rows,), torch.float32)
        self.layout: Mapping[str, Part] = lay_out(parts)
        self.up = self._projection("up", *sizes["up"], activation)
        self.down = self._projection("down", *sizes["down"], None)

    def _projection(self, name: str, n: int, k: int, activation: str | None) -> Projection:
        def offset(part: str) -> int:
            return self.layout[part].offset if part in self.layout else -1

        up = name == "up"
        return Projection(
            n=n,
            k=k,
            k_stored=stored_columns(k),
            weight_offset=offset(name),
            scale_offset=offset(f"{name}_scale"),
            bias_offset=offset(f"{name}_bias"),
            activation=activation,
            gated=up and self._spec.gated,
            limit=self._spec.limit if up else None,
            up_shift=self._spec.up_shift if up else 0.0,
            gather=up,
        )

    def write(self, room: Mapping[str, torch.Tensor], weights: ExpertWeights) -> None:
        """Fill a slot's parts (`SlotStorage.place`) with one expert, quantising on the room's device."""
        up = [self._matrix(*half, room["up"]) for half in _halves(weights.up_2IH, weights.up_scale, self._spec)]
        down = self._matrix(weights.down_HI, weights.down_scale, room["down"])
        room["up"].copy_(_interleave([matrix.codes for matrix in up]))
        room["down"].copy_(down.codes)
        if "down_scale" in room:
            assert down.scale is not None
            room["down_scale"].copy_(down.scale)
            scales = [matrix.scale for matrix in up if matrix.scale is not None]
            by_row = len(scales[0]) == len(up[0].codes)
            room["up_scale"].copy_(_interleave(scales) if by_row else torch.cat(scales))
        if self._spec.bias:
            assert weights.up_bias_2I is not None
            assert weights.down_bias_H is not None
            room["up_bias"].copy_(_interleave(list(weights.up_bias_2I.chunk(len(up)))))
            room["down_bias"].copy_(weights.down_bias_H)

    def _matrix(self, weight_NK: torch.Tensor, scale: torch.Tensor | None, room: torch.Tensor) -> QuantisedWeight:
        """Codes and scales of one matrix; a checkpoint's fp8 blocks are kept by `fp8_block`, else widened first."""
        weight_NK = weight_NK.to(room.device)
        if scale is None:
            return self.scheme.quantise(weight_NK)
        held = QuantisedWeight(pad_columns(weight_NK), scale.to(room.device).float())
        if isinstance(self.scheme, Fp8Block):
            return held
        return self.scheme.quantise(Fp8Block().dequantise(held, weight_NK.shape[1]))


def _halves(
    weight: torch.Tensor, scale: torch.Tensor | None, spec: ExpertSpec
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Gate and up with their block scales, or the one matrix of an expert without gate."""
    if not spec.gated:
        return [(weight, scale)]
    gate, up = weight.chunk(2)
    if scale is None:
        return [(gate, None), (up, None)]
    assert spec.intermediate_size % GROUP == 0, "a block of scales straddles gate and up"
    gate_scale, up_scale = scale.chunk(2)
    return [(gate, gate_scale), (up, up_scale)]


def _interleave(halves: list[torch.Tensor]) -> torch.Tensor:
    """gate0, up0, gate1, up1, ... by rows: a tile of the up projection then holds both, in neighbouring columns."""
    if len(halves) == 1:
        return halves[0]
    if halves[0].dtype == torch.float8_e4m3fn:  # not every torch stacks fp8
        return torch.stack([half.view(torch.uint8) for half in halves], dim=1).flatten(0, 1).view(halves[0].dtype)
    return torch.stack(halves, dim=1).flatten(0, 1)
