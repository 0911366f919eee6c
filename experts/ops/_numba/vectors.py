"""What the matrix products' code is made of: this CPU's vectors, panels, and how LLVM is told of memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils

_FEATURES = llvm.get_host_cpu_features()
# AVX-512 has 32 registers of 16 numbers; elsewhere 16 of 8 is what there is at least.
LANES = 16 if _FEATURES.get("avx512f") else 8
VECTORS = 2
PANEL = VECTORS * LANES
"""Outputs that lie beside each other in a packed matrix."""
HAS_DOTS = bool(_FEATURES.get("avx512f") and _FEATURES.get("avx512vnni"))
"""Whether there is an instruction for sums of four products of bytes."""
HAS_PAIRS = bool(_FEATURES.get("avx512bw") if LANES == 16 else _FEATURES.get("avx2"))
"""Whether there is one for sums of two products of 16 bits, in vectors of LANES such sums."""

I8, I32, I64 = (ir.IntType(bits) for bits in (8, 32, 64))
FLOAT = ir.VectorType(ir.FloatType(), LANES)
INT = ir.VectorType(I32, LANES)
VECTOR_BYTES = LANES * 4

# How far ahead memory is asked for; processors' own prefetchers stop at every page.
_AHEAD_BYTES = 8192


class Emitter:
    """Emits code at `builder`'s place; addresses are 64-bit integers."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def times(self, value: ir.Value, factor: int) -> ir.Value:
        return self.builder.mul(value, ir.Constant(I64, factor))

    def at(self, address: ir.Value, offset: ir.Value, constant: int = 0) -> ir.Value:
        return self.builder.add(address, self.builder.add(offset, ir.Constant(I64, constant)))

    def after(self, address: ir.Value, constant: int) -> ir.Value:
        return self.builder.add(address, ir.Constant(I64, constant))

    def load(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=1)

    def store(self, vector: ir.Value, address: ir.Value) -> None:
        self.builder.store(vector, self.builder.inttoptr(address, vector.type.as_pointer()), align=4)

    def load_panel(self, address: ir.Value) -> list[ir.Value]:
        """A float32 for each output of a panel."""
        return [self.load(self.after(address, v * VECTOR_BYTES), FLOAT) for v in range(VECTORS)]

    def spread(self, value: ir.Value) -> ir.Value:
        """A vector of one value."""
        vector = ir.VectorType(value.type, LANES)
        first = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
        return self.builder.shuffle_vector(first, first, same(INT, 0))

    def multiply_add(self, left: ir.Value, right: ir.Value, total: ir.Value) -> ir.Value:
        kind = ir.FunctionType(FLOAT, [FLOAT] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return self.builder.call(function, [left, right, total])

    def loop(
        self,
        first: ir.Value,
        end: ir.Value,
        step: int,
        before: Sequence[ir.Value],
        body: Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """What `body`, of an index and what there is then, makes of `before`: for every `step`-th index from `first` on
        below `end`, if there is any."""
        builder = self.builder
        entry, loop, after = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", first, end), loop, after)
        builder.position_at_end(loop)
        index, states = builder.phi(I64), [builder.phi(value.type) for value in before]
        made = body(index, states)
        following, last = builder.add(index, ir.Constant(I64, step)), builder.block
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
        for phi, start, then in zip([index, *states], [first, *before], [following, *made], strict=True):
            phi.add_incoming(start, entry)
            phi.add_incoming(then, last)
        builder.position_at_end(after)
        results = [builder.phi(value.type) for value in before]
        for phi, start, then in zip(results, before, made, strict=True):
            phi.add_incoming(start, entry)
            phi.add_incoming(then, last)
        return results

    def prefetch(self, address: ir.Value, size: int, *, once: bool) -> None:
        """Ask for memory that is read soon after `address`.

        once: nobody reads it again: the caches stay as they were, and the next Python call finds its own.
        """
        pointer = I8.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
        prefetch = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(I32, value) for value in (0, 0 if once else 3, 1))
        for line in range(0, size, 64):
            place = self.builder.inttoptr(self.after(address, _AHEAD_BYTES + line), pointer)
            self.builder.call(prefetch, [place, read, keep, data])


def same(vector: ir.VectorType, value: float) -> ir.Constant:
    """A constant vector of one value."""
    return ir.Constant(vector, [ir.Constant(vector.element, value)] * LANES)
