"""The product of float32 rows and packed matrices, compiled for this machine's CPU.

A matrix lies in panels of PANEL outputs, input by input, so that a panel is read once from its first byte to its
last; bfloat16 numbers so that each word of four bytes has one of a panel's first half and one of its second. A tile
keeps its sums, TILE_ROWS rows of one panel, in registers: for each input it widens the panel's weights to float32 and
adds their products with one value of each row (the inner loop of Goto and van de Geijn 2008, "Anatomy of
High-Performance Matrix Multiplication"). Inputs are added in ascending order whatever the tile, so a row's result does
not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from experts.ops._numba.dot_matmul import compile_dot_matmul
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.pair_matmul import compile_pair_matmul
from experts.ops._numba.tiles import emit_versions, even_tile
from experts.ops._numba.vectors import FLOAT, I8, I64, INT, LANES, PANEL, VECTOR_BYTES, VECTORS, Emitter, same
from experts.ops.packed_matmul import DOTS, PAIRS

TILE_ROWS = 12 if LANES == 16 else 6
# Rows' inputs are taken in pieces of so many bytes, which stay in a core's second cache for all panels,
_CACHED_BYTES = 512 << 10
# but not fewer at once than pay for putting sums aside.
_LEAST_DEPTH = 512
# Of a row, that are taken at a time.
_INPUTS = 2
_BYTES = ir.VectorType(I8, LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)


# A packed matrix's dtype as compiled code calls it, and whether it has biases.
Kind = tuple[str, bool]


@dataclass(frozen=True, slots=True)
class _Format:
    """Bytes of a weight, how what lies in a panel for one input is read and becomes vectors of float32 (the type of a
    read, and what is made of each), and whether these are steps of a scale."""

    itemsize: int
    read: ir.Type
    widen: Callable[[ir.IRBuilder, ir.Value], list[ir.Value]]
    scaled: bool = False


def _widen_bfloat16(builder: ir.IRBuilder, pairs: ir.Value) -> list[ir.Value]:
    """A bfloat16 is the upper half of its float32: of those that share a word one is moved there, one is there."""
    moved, there = builder.shl(pairs, same(INT, 16)), builder.and_(pairs, same(INT, 0xFFFF0000))
    return [builder.bitcast(bits, FLOAT) for bits in (moved, there)]


_FORMATS = {
    "float32": _Format(4, FLOAT, lambda _, weights: [weights]),
    "bfloat16": _Format(2, INT, _widen_bfloat16),
    "float16": _Format(2, _HALVES, lambda builder, halves: [builder.fpext(halves, FLOAT)]),
    "int8": _Format(1, _BYTES, lambda builder, steps: [builder.sitofp(builder.sext(steps, INT), FLOAT)], scaled=True),
}


@cache
def compile_matmul(weight_format: str, *, biased: bool) -> Callable[..., None]:
    """The compiled product for matrices of `weight_format`; it runs without the GIL.

    Arguments, all int64: arrays of addresses of the matrices [M], of their outputs' scales and of their biases, 0
    where there are none, and of where each matrix's rows start [M + 1]; panels and inputs of a matrix; address of the
    first matrix's first row, and bytes from one row to the next; the same of the result, whose rows hold whole panels.
    """
    if weight_format == DOTS:
        return compile_dot_matmul(biased=biased)
    if weight_format == PAIRS:
        return compile_pair_matmul(biased=biased)
    kind = _FORMATS[weight_format]
    panel_bytes = PANEL * kind.itemsize
    tile = _tile(kind, biased)

    def matmul(
        matrices: Any,
        scales: Any,
        biases: Any,
        starts: Any,
        panels: int,
        inputs: int,
        rows: int,
        row_bytes: int,
        out: int,
        out_bytes: int,
    ) -> None:
        for matrix in range(len(matrices)):
            begin, end = starts[matrix] - starts[0], starts[matrix + 1] - starts[0]
            most = max(_LEAST_DEPTH, _CACHED_BYTES // (4 * max(1, end - begin)))
            for first in range(0, inputs, most):
                depth = min(most, inputs - first)
                for panel in range(panels):
                    row = begin
                    while row < end:
                        tile_rows = even_tile(end - row, TILE_ROWS)
                        tile(
                            tile_rows,
                            first == 0,
                            first + depth == inputs,
                            depth,
                            matrices[matrix] + (panel * inputs + first) * panel_bytes,
                            scales[matrix] + panel * PANEL * 4,
                            biases[matrix] + panel * PANEL * 4,
                            rows + row * row_bytes + first * 4,
                            row_bytes,
                            out + row * out_bytes + panel * PANEL * 4,
                            out_bytes,
                        )
                        row += tile_rows

    signature = types.void(*[types.int64[::1]] * 4, *[types.int64] * 6)
    return compiled(matmul, signature, variant=(weight_format, biased))


def _tile(kind: _Format, biased: bool) -> Any:
    """The function that computes a tile, in a version for every number of rows up to TILE_ROWS."""

    @intrinsic
    def tile(
        _: Any,
        rows: Any,
        is_first: Any,
        is_last: Any,
        depth: Any,
        weights: Any,
        scale: Any,
        bias: Any,
        row: Any,
        row_bytes: Any,
        out: Any,
        out_bytes: Any,
    ) -> Any:
        def codegen(_: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> None:
            emit_versions(
                builder, values[0], TILE_ROWS, lambda rows: _Tile(builder, kind, biased, rows).emit(*values[1:])
            )

        flags = types.boolean, types.boolean
        return types.void(types.int64, *flags, *[types.int64] * 8), codegen

    return tile


class _Tile(Emitter):
    """Emits the code of a tile of `rows` rows."""

    def __init__(self, builder: ir.IRBuilder, kind: _Format, biased: bool, rows: int) -> None:
        super().__init__(builder)
        self._kind = kind
        self._biased = biased
        self._rows = rows

    def emit(
        self,
        is_first: ir.Value,
        is_last: ir.Value,
        depth: ir.Value,
        weights: ir.Value,
        scale: ir.Value,
        bias: ir.Value,
        row: ir.Value,
        row_bytes: ir.Value,
        out: ir.Value,
        out_bytes: ir.Value,
    ) -> None:
        """Sums of `depth` inputs to `out`: from zero at the first, times scales and with biases at the last."""
        builder = self.builder
        vectors = [(r, v) for r in range(self._rows) for v in range(VECTORS)]
        places = [self.at(out, self.times(out_bytes, r), v * VECTOR_BYTES) for r, v in vectors]
        rows = [self.at(row, self.times(row_bytes, r)) for r in range(self._rows)]
        before = [builder.select(is_first, same(FLOAT, 0.0), self.load(place, FLOAT)) for place in places]
        # Two inputs at a time share a cache line, which is asked for once.
        whole = builder.and_(depth, ir.Constant(I64, -_INPUTS))
        added = self._add_inputs(ir.Constant(I64, 0), whole, _INPUTS, weights, rows, before)
        added = self._add_inputs(whole, depth, 1, weights, rows, added)
        if self._kind.scaled or self._biased:
            steps = self.load_panel(scale) if self._kind.scaled else [same(FLOAT, 1.0)] * VECTORS
            biases = self.load_panel(bias) if self._biased else [same(FLOAT, 0.0)] * VECTORS
            worth = [self.multiply_add(sum_, steps[v], biases[v]) for sum_, (_, v) in zip(added, vectors, strict=True)]
            added = [builder.select(is_last, *choice) for choice in zip(worth, added, strict=True)]
        for place, total in zip(places, added, strict=True):
            self.store(total, place)

    def _add_inputs(
        self,
        first: ir.Value,
        end: ir.Value,
        step: int,
        weights: ir.Value,
        rows: Sequence[ir.Value],
        before: Sequence[ir.Value],
    ) -> list[ir.Value]:
        """The sums after inputs from `first` to `end`, so many at a time: their weights for a panel, times every row's
        values."""
        input_bytes = PANEL * self._kind.itemsize

        def add(index: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            place, added = self.at(weights, self.times(index, input_bytes)), list(sums)
            self.prefetch(place, step * input_bytes, once=self._rows < TILE_ROWS)
            for number in range(step):
                widened = self._widen(self.after(place, number * input_bytes))
                for r, row in enumerate(rows):
                    value = self.spread(self.load(self.at(row, self.times(index, 4), number * 4), ir.FloatType()))
                    for at, weight in enumerate(widened, r * VECTORS):
                        added[at] = self.multiply_add(weight, value, added[at])
            return added

        return self.loop(first, end, step, before, add)

    def _widen(self, weights: ir.Value) -> list[ir.Value]:
        """A panel's weights for an input."""
        widened: list[ir.Value] = []
        while len(widened) < VECTORS:
            place = self.after(weights, len(widened) * LANES * self._kind.itemsize)
            widened += self._kind.widen(self.builder, self.load(place, self._kind.read))
        return widened
