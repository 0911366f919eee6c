"""The product of float32 rows and int8 matrices, with the instruction that adds four products of bytes (AVX-512 VNNI).

A row becomes whole steps of its largest value (`row_steps.py`). Each is 256 * high + low, both of them bytes, so that a
row's sum is 256 * (its high bytes' sum) + (its low bytes' sum), both exact: twice as many products, at four times the
pace. The instruction wants one side unsigned: weights are kept with 128 added to each, and 128 times the sum of a row's
bytes is what its sums start below zero. Four inputs of an output lie beside each other in a panel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from experts.ops._numba.memory import memory
from experts.ops._numba.object_cache import SUMS, compiled, part
from experts.ops._numba.row_steps import HEAD_BYTES, whole_steps, write_step
from experts.ops._numba.tiles import emit_versions, even_tile
from experts.ops._numba.vectors import FLOAT, I32, I64, INT, PANEL, VECTOR_BYTES, VECTORS, Emitter, same

INPUTS = 4
"""That lie beside each other."""
MOST_INPUTS = 1 << 16
"""Of a matrix, so that no sum of bytes' products is more than 32 bits hold."""
_TILE_ROWS = 6


@part((), fastmath=SUMS, error_model="numpy")
def _cut(row: Any, inputs: Any, out: Any, plane: Any) -> None:
    """A float32 row at an address, to its head and two planes of bytes at another.

    The head holds what a step is worth, and where the sums of high and of low bytes start.
    """
    values, steps = numba.carray(memory(row), inputs, np.float32), write_step(row, inputs, out)
    high = numba.carray(memory(out + HEAD_BYTES), plane, np.int8)
    low = numba.carray(memory(out + HEAD_BYTES + plane), plane, np.int8)
    sum_high, sum_low = np.int32(0), np.int32(0)
    for i in range(inputs):
        whole = whole_steps(values[i], steps)
        lower = ((whole + np.int32(128)) & np.int32(255)) - np.int32(128)
        upper = (whole - lower) >> np.int32(8)
        high[i], low[i] = upper, lower
        sum_high += upper
        sum_low += lower
    high[inputs:], low[inputs:] = 0, 0
    starts = numba.carray(memory(out), 3, np.int32)
    starts[1], starts[2] = np.int32(-128) * sum_high, np.int32(-128) * sum_low


@cache
def compile_dot_matmul(*, biased: bool) -> Callable[..., None]:
    """The compiled product, with the arguments of `compile_matmul`."""
    tile = _tile(biased)

    def dot_matmul(
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
        plane = (inputs + INPUTS - 1) // INPUTS * INPUTS
        cut_bytes = HEAD_BYTES + 2 * plane
        cut = np.empty((starts[len(matrices)] - starts[0]) * cut_bytes, np.int8)
        for matrix in range(len(matrices)):
            begin, end = starts[matrix] - starts[0], starts[matrix + 1] - starts[0]
            for row in range(begin, end):
                _cut(rows + row * row_bytes, inputs, cut.ctypes.data + row * cut_bytes, plane)
            for panel in range(panels):
                row = begin
                while row < end:
                    tile_rows = even_tile(end - row, _TILE_ROWS)
                    tile(
                        tile_rows,
                        plane,
                        matrices[matrix] + panel * plane * PANEL,
                        scales[matrix] + panel * PANEL * 4,
                        biases[matrix] + panel * PANEL * 4,
                        cut.ctypes.data + row * cut_bytes,
                        cut_bytes,
                        out + row * out_bytes + panel * PANEL * 4,
                        out_bytes,
                    )
                    row += tile_rows

    signature = types.void(*[types.int64[::1]] * 4, *[types.int64] * 6)
    return compiled(dot_matmul, signature, variant=(biased,))


def _tile(biased: bool) -> Any:
    """The function that computes a tile, in a version for every number of rows up to _TILE_ROWS."""

    @intrinsic
    def tile(
        _: Any,
        rows: Any,
        plane: Any,
        weights: Any,
        scale: Any,
        bias: Any,
        row: Any,
        row_bytes: Any,
        out: Any,
        out_bytes: Any,
    ) -> Any:
        def codegen(_: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> None:
            emit_versions(builder, values[0], _TILE_ROWS, lambda rows: _Tile(builder, biased, rows).emit(*values[1:]))

        return types.void(*[types.int64] * 9), codegen

    return tile


class _Tile(Emitter):
    """Emits the code of a tile of `rows` rows."""

    def __init__(self, builder: ir.IRBuilder, biased: bool, rows: int) -> None:
        super().__init__(builder)
        self._biased = biased
        self._rows = rows

    def emit(
        self,
        plane: ir.Value,
        weights: ir.Value,
        scale: ir.Value,
        bias: ir.Value,
        row: ir.Value,
        row_bytes: ir.Value,
        out: ir.Value,
        out_bytes: ir.Value,
    ) -> None:
        """Sums over `plane` inputs to `out`, in float32."""
        builder = self.builder
        heads = [self.at(row, self.times(row_bytes, r)) for r in range(self._rows)]
        planes = [builder.add(self.after(head, HEAD_BYTES), offset) for head in heads for offset in (_ZERO, plane)]
        before = [
            self.spread(self.load(self.after(head, offset), I32))
            for head in heads
            for offset in (4, 8)
            for _ in range(VECTORS)
        ]

        def add(index: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            place = self.at(weights, self.times(index, PANEL))
            self.prefetch(place, PANEL * INPUTS, once=self._rows < _TILE_ROWS)
            read = [self.load(self.after(place, v * VECTOR_BYTES), INT) for v in range(VECTORS)]
            added: list[ir.Value] = []
            for each in planes:
                four = self.spread(self.load(builder.add(each, index), I32))
                added += [self._dot(sums[len(added) + v], read[v], four) for v in range(VECTORS)]
            return added

        added = self.loop(_ZERO, plane, INPUTS, before, add)
        scales = self.load_panel(scale)
        biases = self.load_panel(bias) if self._biased else [same(FLOAT, 0.0)] * VECTORS
        for r, head in enumerate(heads):
            step, target = self.spread(self.load(head, ir.FloatType())), self.at(out, self.times(out_bytes, r))
            for v in range(VECTORS):
                high, low = (builder.sitofp(added[(2 * r + half) * VECTORS + v], FLOAT) for half in (0, 1))
                total = builder.fmul(self.multiply_add(high, same(FLOAT, 256.0), low), step)
                self.store(self.multiply_add(total, scales[v], biases[v]), self.after(target, v * VECTOR_BYTES))

    def _dot(self, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """Each word and the four products of bytes below it."""
        kind = ir.FunctionType(INT, [INT] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return self.builder.call(function, [total, unsigned, signed])


_ZERO = ir.Constant(I64, 0)
