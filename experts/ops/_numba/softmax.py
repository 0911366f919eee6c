"""Softmax of a row, compiled for this machine's CPU. Rows are short: no loop is left over for what fills no vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from experts.ops._numba.activations import EXP, LEAST, LN2_HIGH, LN2_LOW, LOG2_E, ROUND
from experts.ops._numba.vectors import FLOAT, I32, I64, INT, LANES, VECTOR_BYTES, Emitter, same

_ONE = np.float32(1)
_MASK = ir.VectorType(ir.IntType(1), LANES)
_LOWEST = same(FLOAT, -math.inf)
_Step = Callable[[ir.Value, ir.Value, Sequence[ir.Value]], Sequence[ir.Value]]


@njit(nogil=True)
def softmax(scores, scale):  # type: ignore[no-untyped-def]
    """Of float32 scores [N] times `scale`, in place; all NaN where one is NaN or infinite."""
    place, count = np.int64(scores.ctypes.data), len(scores)
    _share(place, count, _ONE / _exponentials(place, count, scale))


@intrinsic
def _exponentials(_: Any, place: Any, count: Any, scale: Any) -> Any:
    """Puts exp(scale * x - the largest of them) in the place of `count` float32 x, returns their sum."""

    def codegen(_: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        row = _Row(builder, *values[:2])
        scale = row.spread(values[2])

        def compare(place: ir.Value, lanes: ir.Value, before: Sequence[ir.Value]) -> Sequence[ir.Value]:
            scores = builder.fmul(row.load_lanes(place, lanes), scale)
            largest = builder.select(builder.fcmp_ordered(">", scores, before[0]), scores, before[0])
            # NaN where a score is NaN or infinite, which the exponential would hide.
            check = builder.fadd(before[1], builder.fmul(scores, same(FLOAT, 0.0)))
            return builder.select(lanes, largest, before[0]), builder.select(lanes, check, before[1])

        largest, check = row.each(compare, [_LOWEST, same(FLOAT, 0.0)])
        peak = row.spread(row.across("fmax", [largest]))

        def raise_(place: ir.Value, lanes: ir.Value, before: Sequence[ir.Value]) -> Sequence[ir.Value]:
            powers = row.exp(builder.fsub(builder.fmul(row.load_lanes(place, lanes), scale), peak))
            row.store_lanes(powers, place, lanes)
            return [builder.fadd(before[0], builder.select(lanes, powers, same(FLOAT, 0.0)))]

        (total,) = row.each(raise_, [check])
        return row.across("fadd", [ir.Constant(ir.FloatType(), 0.0), total])

    return types.float32(types.int64, types.int64, types.float32), codegen


@intrinsic
def _share(_: Any, place: Any, count: Any, factor: Any) -> Any:
    """Multiplies `count` float32 with `factor`."""

    def codegen(_: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> None:
        row = _Row(builder, *values[:2])
        factor = row.spread(values[2])

        def multiply(place: ir.Value, lanes: ir.Value, before: Sequence[ir.Value]) -> Sequence[ir.Value]:
            row.store_lanes(builder.fmul(row.load_lanes(place, lanes), factor), place, lanes)
            return before

        row.each(multiply, [])

    return types.void(types.int64, types.int64, types.float32), codegen


class _Row(Emitter):
    """Emits code that goes through `count` float32 at `place`, a vector at a time."""

    def __init__(self, builder: ir.IRBuilder, place: ir.Value, count: ir.Value) -> None:
        super().__init__(builder)
        self._place = place
        self._count = count

    def each(self, step: _Step, start: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """What `step` makes, vector by vector, of `start`; it gets a vector's place, and which lanes are the row's."""
        builder = self.builder

        def vector(index: ir.Value, states: Sequence[ir.Value]) -> Sequence[ir.Value]:
            left = builder.trunc(builder.sub(self._count, index), I32)
            lanes = builder.icmp_signed("<", ir.Constant(INT, list(range(LANES))), self.spread(left))
            return step(self.at(self._place, self.times(index, VECTOR_BYTES // LANES)), lanes, states)

        return self.loop(ir.Constant(I64, 0), self._count, LANES, start, vector)

    def load_lanes(self, place: ir.Value, lanes: ir.Value) -> ir.Value:
        pointer = self.builder.inttoptr(place, FLOAT.as_pointer())
        kind = ir.FunctionType(FLOAT, [pointer.type, I32, _MASK, FLOAT])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.masked.load.v{LANES}f32.p0")
        return self.builder.call(function, [pointer, ir.Constant(I32, 4), lanes, same(FLOAT, 0.0)])

    def store_lanes(self, vector: ir.Value, place: ir.Value, lanes: ir.Value) -> None:
        pointer = self.builder.inttoptr(place, FLOAT.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [FLOAT, pointer.type, I32, _MASK])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.masked.store.v{LANES}f32.p0")
        self.builder.call(function, [vector, pointer, ir.Constant(I32, 4), lanes])

    def across(self, operation: str, arguments: Sequence[ir.Value]) -> ir.Value:
        """One number of a vector's."""
        kind = ir.FunctionType(ir.FloatType(), [argument.type for argument in arguments])
        name = f"llvm.vector.reduce.{operation}.v{LANES}f32"
        flags = ("reassoc",) if operation == "fadd" else ("nnan",)
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, kind, name), arguments, fastmath=flags
        )

    def exp(self, x: ir.Value) -> ir.Value:
        """As `experts.ops._numba.activations.exp`, of x <= 0."""
        builder = self.builder
        x = builder.select(builder.fcmp_ordered(">", x, same(FLOAT, float(LEAST))), x, same(FLOAT, float(LEAST)))
        whole = builder.fsub(
            self.multiply_add(x, same(FLOAT, float(LOG2_E)), same(FLOAT, float(ROUND))), same(FLOAT, float(ROUND))
        )
        rest = self.multiply_add(whole, same(FLOAT, -float(LN2_HIGH)), x)
        rest = self.multiply_add(whole, same(FLOAT, -float(LN2_LOW)), rest)
        value = same(FLOAT, float(EXP[0]))
        for coefficient in EXP[1:]:
            value = self.multiply_add(value, rest, same(FLOAT, float(coefficient)))
        value = self.multiply_add(builder.fmul(rest, rest), value, builder.fadd(rest, same(FLOAT, 1.0)))
        exponent = builder.shl(builder.add(builder.fptosi(whole, INT), same(INT, 127)), same(INT, 23))
        return builder.fmul(value, builder.bitcast(exponent, FLOAT))
