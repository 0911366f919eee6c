"""Bytes from one address to another, for compiled code to call: loops over bytes stay loops over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def copy_bytes(_: Any, target: Any, source: Any, size: Any) -> Any:
    """`size` bytes from address `source` to address `target`, which must not overlap; all int64."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> Any:
        byte = ir.IntType(8).as_pointer()
        to, since = (builder.inttoptr(value, byte) for value in values[:2])
        cgutils.raw_memcpy(builder, to, since, values[2], 1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen
