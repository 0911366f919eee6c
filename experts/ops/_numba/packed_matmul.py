"""The product of float32 rows and packed matrices, compiled for this machine's CPU.

A matrix lies in panels of PANEL outputs, input by input, so that a panel is read once from its first byte to its
last. A tile keeps its sums, TILE_ROWS rows of one panel, in registers: for each input it widens the panel's weights
to float32 and adds their products with one value of each row (the inner loop of Goto and van de Geijn 2008,
"Anatomy of High-Performance Matrix Multiplication"). Inputs are added in ascending order whatever the tile, so a
row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# AVX-512 has 32 registers of 16 numbers; elsewhere 16 of 8 is what there is at least.
_LANES = 16 if llvm.get_host_cpu_features().get("avx512f") else 8
TILE_ROWS = 12 if _LANES == 16 else 6
_VECTORS = 2
PANEL = _VECTORS * _LANES
# Inputs of a panel that are worked on at once: with the rows' they stay in a core's second cache.
_DEPTH = 4096
# How far ahead memory is asked for; processors' own prefetchers stop at every page.
_AHEAD_BYTES = 8192

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.VectorType(ir.FloatType(), _LANES)
_INT = ir.VectorType(_I32, _LANES)
_ZEROS = ir.Constant(_INT, [ir.Constant(_I32, 0)] * _LANES)

Widen = Callable[[ir.IRBuilder, ir.Value], ir.Value]


def _widen_bfloat16(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    sixteen = ir.Constant(_INT, [ir.Constant(_I32, 16)] * _LANES)
    return builder.bitcast(builder.shl(builder.zext(bits, _INT), sixteen), _FLOAT)


def _widen_int8(builder: ir.IRBuilder, steps: ir.Value) -> ir.Value:
    return builder.sitofp(builder.sext(steps, _INT), _FLOAT)


# Of each format: bytes of a weight, what a vector of them is, and how it becomes float32.
_FORMATS: dict[str, tuple[int, ir.Type, Widen]] = {
    "float32": (4, ir.FloatType(), lambda _, weights: weights),
    "bfloat16": (2, _I16, _widen_bfloat16),
    "float16": (2, ir.HalfType(), lambda builder, weights: builder.fpext(weights, _FLOAT)),
    "int8": (1, _I8, _widen_int8),
}


def compile_matmul(weight_format: str) -> Callable[..., None]:
    """The compiled product for matrices of `weight_format`; it runs without the GIL.

    Arguments, all int64: arrays of matrices' addresses [M], where each one's rows start [M + 1], and addresses of
    their outputs' scales [M] (none of these but for int8, [0]); a matrix's panels and inputs; address of the rows and
    bytes of each; the same of the result, whose rows hold whole panels.
    """
    itemsize, element, widen = _FORMATS[weight_format]
    scaled = weight_format == "int8"
    tile = _tile(itemsize, ir.VectorType(element, _LANES), widen, scaled)
    panel_bytes = PANEL * itemsize

    def matmul(
        matrices: Any,
        starts: Any,
        scales: Any,
        panels: int,
        inputs: int,
        rows: int,
        row_bytes: int,
        out: int,
        out_bytes: int,
    ) -> None:
        for matrix in range(len(matrices)):
            for panel in range(panels):
                weights = matrices[matrix] + panel * inputs * panel_bytes
                scale = scales[matrix] + panel * PANEL * 4 if scaled else 0
                for first in range(0, inputs, _DEPTH):
                    depth = min(_DEPTH, inputs - first)
                    row = starts[matrix]
                    while row < starts[matrix + 1]:
                        tile_rows = min(TILE_ROWS, starts[matrix + 1] - row)
                        tile(
                            tile_rows,
                            first,
                            depth,
                            weights + first * panel_bytes,
                            scale,
                            rows + row * row_bytes + first * 4,
                            row_bytes,
                            out + row * out_bytes + panel * PANEL * 4,
                            out_bytes,
                        )
                        row += tile_rows

    signature = types.void(*[types.int64[::1]] * 3, *[types.int64] * 6)
    compiled: Callable[..., None] = njit([signature], nogil=True)(matmul)
    return compiled


def _tile(itemsize: int, vector: ir.VectorType, widen: Widen, scaled: bool) -> Any:
    """The function that computes a tile, in a version for every number of rows up to TILE_ROWS."""

    @intrinsic
    def tile(
        _: Any,
        rows: Any,
        first: Any,
        depth: Any,
        weights: Any,
        scale: Any,
        row: Any,
        row_bytes: Any,
        out: Any,
        out_bytes: Any,
    ) -> Any:
        def codegen(_: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> None:
            done = builder.append_basic_block("done")
            versions = builder.switch(values[0], done)
            for rows in range(1, TILE_ROWS + 1):
                version = builder.append_basic_block(f"rows_{rows}")
                versions.add_case(ir.Constant(_I64, rows), version)
                builder.position_at_end(version)
                _Tile(builder, rows, itemsize, vector, widen, scaled).emit(*values[1:])
                builder.branch(done)
            builder.position_at_end(done)

        return types.void(*[types.int64] * 9), codegen

    return tile


class _Tile:
    """Emits the code of a tile of `rows` rows."""

    def __init__(
        self, builder: ir.IRBuilder, rows: int, itemsize: int, vector: ir.VectorType, widen: Widen, scaled: bool
    ) -> None:
        self._builder = builder
        self._rows = rows
        self._itemsize = itemsize
        self._vector = vector
        self._widen = widen
        self._scaled = scaled

    def emit(
        self,
        first: ir.Value,
        depth: ir.Value,
        weights: ir.Value,
        scale: ir.Value,
        row: ir.Value,
        row_bytes: ir.Value,
        out: ir.Value,
        out_bytes: ir.Value,
    ) -> None:
        """Sums of `depth` inputs to `out`, after what lies there if these are not the first inputs."""
        builder = self._builder
        vectors = range(_VECTORS)
        places = [self._at(out, self._times(out_bytes, r), v * _LANES * 4) for r in range(self._rows) for v in vectors]
        zero = ir.Constant(_FLOAT, [ir.Constant(ir.FloatType(), 0.0)] * _LANES)
        is_first = builder.icmp_signed("==", first, ir.Constant(_I64, 0))
        before = [builder.select(is_first, zero, self._load(place, _FLOAT)) for place in places]
        rows = [self._at(row, self._times(row_bytes, r)) for r in range(self._rows)]
        entry, loop, after = builder.block, builder.append_basic_block("input"), builder.append_basic_block("summed")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(_I64)
        sums = [builder.phi(_FLOAT) for _ in places]
        added = self._add_input(self._at(weights, self._times(index, PANEL * self._itemsize)), rows, index, sums)
        following = builder.add(index, ir.Constant(_I64, 1))
        starts = [zero for _ in places] if self._scaled else before
        for phi, start, end in zip([index, *sums], [ir.Constant(_I64, 0), *starts], [following, *added], strict=True):
            phi.add_incoming(start, entry)
            phi.add_incoming(end, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        if self._scaled:
            worth = [
                self._load(self._at(scale, ir.Constant(_I64, v * _LANES * 4)), _FLOAT) for v in vectors
            ] * self._rows
            added = [self._multiply_add(*terms) for terms in zip(added, worth, before, strict=True)]
        for place, total in zip(places, added, strict=True):
            builder.store(total, builder.inttoptr(place, _FLOAT.as_pointer()), align=4)

    def _add_input(
        self, weights: ir.Value, rows: Sequence[ir.Value], index: ir.Value, sums: Sequence[ir.Value]
    ) -> list[ir.Value]:
        builder = self._builder
        for line in range(0, PANEL * self._itemsize, 64):
            self._prefetch(self._at(weights, ir.Constant(_I64, _AHEAD_BYTES + line)))
        vector_bytes = _LANES * self._itemsize
        widened = [
            self._widen(builder, self._load(self._at(weights, ir.Constant(_I64, v * vector_bytes)), self._vector))
            for v in range(_VECTORS)
        ]
        added = []
        for number, row in enumerate(rows):
            value = self._load(self._at(row, self._times(index, 4)), ir.FloatType())
            first = builder.insert_element(ir.Constant(_FLOAT, ir.Undefined), value, ir.Constant(_I32, 0))
            spread = builder.shuffle_vector(first, first, _ZEROS)
            for v, weight in enumerate(widened):
                added.append(self._multiply_add(weight, spread, sums[number * _VECTORS + v]))
        return added

    def _times(self, value: ir.Value, factor: int) -> ir.Value:
        return self._builder.mul(value, ir.Constant(_I64, factor))

    def _at(self, address: ir.Value, offset: ir.Value, constant: int = 0) -> ir.Value:
        return self._builder.add(address, self._builder.add(offset, ir.Constant(_I64, constant)))

    def _load(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self._builder.load(self._builder.inttoptr(address, kind.as_pointer()), align=1)

    def _multiply_add(self, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
        kind = ir.FunctionType(_FLOAT, [_FLOAT] * 3)
        function = cgutils.get_or_insert_function(self._builder.module, kind, f"llvm.fmuladd.v{_LANES}f32")
        return self._builder.call(function, [left, right, total])

    def _prefetch(self, address: ir.Value) -> None:
        pointer = _I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        prefetch = cgutils.get_or_insert_function(self._builder.module, kind, "llvm.prefetch.p0")
        # Weights that no other tile will read leave the caches as they were, and the next Python call finds its own.
        locality = 0 if self._rows < TILE_ROWS else 3
        read, keep, data = (ir.Constant(_I32, value) for value in (0, locality, 1))
        self._builder.call(prefetch, [self._builder.inttoptr(address, pointer), read, keep, data])
