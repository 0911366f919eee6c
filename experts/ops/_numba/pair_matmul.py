"""The product of float32 rows and int8 matrices, with the instruction that adds two products of 16 bits (AVX2).

For CPUs that do not multiply bytes (`dot_matmul.py`). A row becomes whole steps of its largest value (`row_steps.py`),
weights are widened to as many bits as they are read: twice the products of float32 in an instruction, and exact sums.
As 32 bits hold no more of them, the sums of every DEPTH inputs are added up in float32. Two inputs of an output lie
beside each other in a panel.
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
from experts.ops._numba.vectors import FLOAT, I8, I32, I64, INT, LANES, PANEL, VECTOR_BYTES, VECTORS, Emitter, same

INPUTS = 2
"""That lie beside each other."""
DEPTH = 512
"""Inputs whose products, the largest, 32 bits hold."""
# Pairs of an output that are taken at a time, so that less is counted and asked for.
_PAIRS = 2
MULTIPLE = INPUTS * _PAIRS
"""How many inputs there are is a multiple of it."""
_TILE_ROWS = 12 if LANES == 16 else 6
_BYTES, _WORDS = ir.VectorType(I8, 2 * LANES), ir.VectorType(ir.IntType(16), 2 * LANES)
_ADD_PRODUCTS = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"


@part((), fastmath=SUMS, error_model="numpy")
def _cut(row: Any, inputs: Any, out: Any) -> None:
    """A float32 row at an address, to what a step is worth and its steps, int16, at another."""
    values, steps = numba.carray(memory(row), inputs, np.float32), write_step(row, inputs, out)
    words = numba.carray(memory(out + HEAD_BYTES), inputs, np.int16)
    for i in range(inputs):
        words[i] = whole_steps(values[i], steps)


@cache
def compile_pair_matmul(*, biased: bool) -> Callable[..., None]:
    """The compiled product, with the arguments of `compile_matmul`."""
    tile = _tile(biased)

    def pair_matmul(
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
        cut_bytes = HEAD_BYTES + 2 * inputs
        cut = np.empty((starts[len(matrices)] - starts[0]) * cut_bytes, np.int8)
        for matrix in range(len(matrices)):
            begin, end = starts[matrix] - starts[0], starts[matrix + 1] - starts[0]
            for row in range(begin, end):
                _cut(rows + row * row_bytes, inputs, cut.ctypes.data + row * cut_bytes)
            for first in range(0, inputs, DEPTH):
                for panel in range(panels):
                    row = begin
                    while row < end:
                        tile_rows = even_tile(end - row, _TILE_ROWS)
                        tile(
                            tile_rows,
                            first,
                            min(DEPTH, inputs - first),
                            matrices[matrix] + (panel * inputs + first) * PANEL,
                            scales[matrix] + panel * PANEL * 4,
                            biases[matrix] + panel * PANEL * 4,
                            cut.ctypes.data + row * cut_bytes,
                            cut_bytes,
                            out + row * out_bytes + panel * PANEL * 4,
                            out_bytes,
                        )
                        row += tile_rows

    signature = types.void(*[types.int64[::1]] * 4, *[types.int64] * 6)
    return compiled(pair_matmul, signature, variant=(biased,))


def _tile(biased: bool) -> Any:
    """The function that computes a tile, in a version for every number of rows up to _TILE_ROWS."""

    @intrinsic
    def tile(
        _: Any,
        rows: Any,
        first: Any,
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
            emit_versions(builder, values[0], _TILE_ROWS, lambda rows: _Tile(builder, biased, rows).emit(*values[1:]))

        return types.void(*[types.int64] * 10), codegen

    return tile


class _Tile(Emitter):
    """Emits the code of a tile of `rows` rows."""

    def __init__(self, builder: ir.IRBuilder, biased: bool, rows: int) -> None:
        super().__init__(builder)
        self._biased = biased
        self._rows = rows

    def emit(
        self,
        first: ir.Value,
        depth: ir.Value,
        weights: ir.Value,
        scale: ir.Value,
        bias: ir.Value,
        row: ir.Value,
        row_bytes: ir.Value,
        out: ir.Value,
        out_bytes: ir.Value,
    ) -> None:
        """Sums over `depth` inputs from `first` on to `out`: from the biases at the first."""
        builder = self.builder
        heads = [self.at(row, self.times(row_bytes, r)) for r in range(self._rows)]
        words = [self.at(head, self.times(first, 2), HEAD_BYTES) for head in heads]

        def add(index: ir.Value, sums: Sequence[ir.Value]) -> list[ir.Value]:
            place, added = self.at(weights, self.times(index, PANEL)), list(sums)
            self.prefetch(place, PANEL * MULTIPLE, once=self._rows < _TILE_ROWS)
            for pair in range(_PAIRS):
                read = [
                    builder.sext(self.load(self.after(place, (pair * VECTORS + v) * LANES * INPUTS), _BYTES), _WORDS)
                    for v in range(VECTORS)
                ]
                for r, each in enumerate(words):
                    two = self.load(self.at(each, self.times(index, 2), pair * INPUTS * 2), I32)
                    spread = builder.bitcast(self.spread(two), _WORDS)
                    for at, weight in enumerate(read, r * VECTORS):
                        added[at] = builder.add(added[at], self._products(weight, spread))
            return added

        added = self.loop(ir.Constant(I64, 0), depth, MULTIPLE, [same(INT, 0)] * (self._rows * VECTORS), add)
        is_first = builder.icmp_signed("==", first, ir.Constant(I64, 0))
        scales = self.load_panel(scale)
        biases = self.load_panel(bias) if self._biased else [same(FLOAT, 0.0)] * VECTORS
        for r, head in enumerate(heads):
            step, target = self.spread(self.load(head, ir.FloatType())), self.at(out, self.times(out_bytes, r))
            for v in range(VECTORS):
                there = self.after(target, v * VECTOR_BYTES)
                before = builder.select(is_first, biases[v], self.load(there, FLOAT))
                total = builder.fmul(builder.sitofp(added[r * VECTORS + v], FLOAT), step)
                self.store(self.multiply_add(total, scales[v], before), there)

    def _products(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """Of two pairs of 16 bits each, added."""
        kind = ir.FunctionType(INT, [_WORDS] * 2)
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, _ADD_PRODUCTS), [left, right]
        )
