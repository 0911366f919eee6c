"""Shapes that the GPU benchmark runs, and one case of it: a model's experts on the card in one scheme."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from experts.ops._triton.combine import combine
from experts.ops._triton.quantise_rows import quantise_rows
from experts.ops.activations import activate
from experts.ops.triton_backend import TritonBackend
from experts.quant.schemes import build_scheme
from experts.spec import ExpertSpec, ExpertWeights

DISTINCT = 4  # experts with weights of their own; the others repeat them in memory of their own
Clock = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Shape:
    """Experts that one card holds of one layer."""

    name: str
    experts: int
    hidden: int
    intermediate: int


SHAPES = (
    Shape("deepseek-v3 8 local", 8, 7168, 2048),
    Shape("mixtral-8x7b", 8, 4096, 14336),
    Shape("qwen3-30b-a3b", 128, 2048, 768),
    Shape("deepseek-v3 32 local", 32, 7168, 2048),
)
ROWS = (1, 16, 64, 512, 4096, 16384)
TINY_SHAPES = (Shape("tiny", 3, 128, 64), Shape("tiny odd", 2, 80, 48))
TINY_ROWS = (1, 7)


@dataclass(frozen=True)
class Call:
    """Rows spread evenly over the experts (over `rows` of them where there are fewer rows), each a token of its own."""

    hidden_TH: torch.Tensor
    slots_S: torch.Tensor
    offsets_S1: torch.Tensor
    token_rows_R: torch.Tensor
    weights_R: torch.Tensor


class Case:
    """One shape in one scheme on the card, loaded and warm."""

    def __init__(self, shape: Shape, scheme: str, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.spec = ExpertSpec(hidden_size=shape.hidden, intermediate_size=shape.intermediate)
        self.scheme = build_scheme(scheme, dtype)
        generator = torch.Generator(device).manual_seed(0)

        def draw(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=generator, device=device) / columns**0.5).to(dtype)

        self.distinct = [
            ExpertWeights(
                up_2IH=draw(2 * shape.intermediate, shape.hidden), down_HI=draw(shape.hidden, shape.intermediate)
            )
            for _ in range(min(DISTINCT, shape.experts))
        ]
        began = time.monotonic()
        self.backend = TritonBackend(self.spec, device=device, dtype=dtype, quantization=scheme)
        for slot in range(shape.experts):
            self.backend.load(slot, self.distinct[slot % DISTINCT])
        self.load_and_warm_s = time.monotonic() - began

    def call(self, rows: int) -> Call:
        """`rows` routed rows with random hidden states."""
        hit = min(rows, self.shape.experts)
        counts = torch.full((hit,), rows // hit) + (torch.arange(hit) < rows % hit)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        generator = torch.Generator(self.device).manual_seed(rows)
        return Call(
            torch.randn(rows, self.shape.hidden, generator=generator, device=self.device).to(self.dtype),
            torch.randperm(self.shape.experts, generator=torch.Generator().manual_seed(rows))[:hit]
            .int()
            .to(self.device),
            offsets.int().to(self.device),
            torch.randperm(rows, generator=torch.Generator().manual_seed(rows)).int().to(self.device),
            torch.rand(rows, generator=generator, device=self.device),
        )

    def time_projections(self, call: Call, clock: Clock) -> dict[str, float]:
        """ms of the up projection (gather, activation and quantising of rows included) and of the down projection."""
        times = {}
        rows, hit = call.token_rows_R.numel(), call.slots_S.numel()
        x = call.hidden_TH
        for name, projection in zip(("up", "down"), self.backend.projections, strict=True):
            config = self.backend.tuning.choose(projection, -(-rows // hit))
            tiles = self.backend.tiles(call.slots_S, call.offsets_S1, rows, config)
            arguments = (projection, config, x, call.token_rows_R, tiles)
            times[name] = clock(lambda arguments=arguments: self.backend.project(*arguments))
            x = self.backend.project(*arguments)
        return times

    def time_all(self, call: Call, clock: Clock) -> float:
        """ms of everything between hidden_TH and partial_TH: tile table, both projections, combine."""
        arguments = (call.hidden_TH, call.slots_S, call.offsets_S1, call.token_rows_R, call.weights_R)
        return clock(lambda: self.backend.run(*arguments))

    def relative_error(self, call: Call) -> float:
        """Of partial_TH against float32 torch with the weights that the scheme's codes stand for."""
        out = self.backend.forward(call.hidden_TH, call.slots_S, call.offsets_S1, call.token_rows_R, call.weights_R)
        expected = torch.empty(call.token_rows_R.numel(), self.shape.hidden, device=self.device)
        offsets = call.offsets_S1.tolist()
        widened: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for slot, start, end in zip(call.slots_S.tolist(), offsets, offsets[1:], strict=False):
            index = slot % DISTINCT
            if index not in widened:
                weights = self.distinct[index]
                up = torch.cat([self._held(half) for half in weights.up_2IH.chunk(2)])
                widened[index] = up, self._held(weights.down_HI)
            up, down = widened[index]
            rows = self._rows(call.hidden_TH[call.token_rows_R[start:end].long()])
            between = activate(F.linear(rows, up), self.spec).to(self.dtype)
            expected[start:end] = F.linear(self._rows(between), down)
        partial = torch.zeros_like(out).index_add_(0, call.token_rows_R.long(), expected * call.weights_R[:, None])
        return float((out - partial).norm() / partial.norm())

    def _held(self, weight: torch.Tensor) -> torch.Tensor:
        return self.scheme.dequantise(self.scheme.quantise(weight), weight.shape[1])

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        if self.scheme.name not in ("fp8", "fp8_block"):
            return x.float()
        codes, scales = quantise_rows(x, group=128 if self.scheme.name == "fp8_block" else None)
        scales = scales.repeat_interleave(128, 1) if scales.dim() == 2 else scales[:, None]
        return (codes.float() * scales)[:, : x.shape[1]]

    def weight_bytes(self, projection: str) -> int:
        """Bytes of one expert's matrix with its scales, as it lies in a slot."""
        rows, columns = self.sizes(projection)
        codes = torch.Size(self.scheme.codes_shape(rows, columns)).numel() * self.scheme.codes_dtype.itemsize
        scale = self.scheme.scale_shape(rows, columns)
        return codes + (0 if scale is None else 4 * torch.Size(scale).numel())

    def flops(self, projection: str, rows: int) -> int:
        """Of the matmul alone."""
        n, k = self.sizes(projection)
        return 2 * rows * n * k

    def sizes(self, projection: str) -> tuple[int, int]:
        """Output and input columns."""
        h, i = self.shape.hidden, self.shape.intermediate
        return (2 * i, h) if projection == "up" else (h, i)


def time_combine(case: Case, call: Call, clock: Clock) -> float:
    """ms of the router-weighted sum alone."""
    out = torch.randn(call.token_rows_R.numel(), case.shape.hidden, device=case.device).to(case.dtype)
    return clock(lambda: combine(out, call.offsets_S1, call.token_rows_R, call.weights_R, len(call.hidden_TH)))
