"""Tickets that several threads in compiled code take, each a number that nobody else gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_ORDER = "seq_cst"


@intrinsic
def take_ticket(_: Any, address: Any) -> Any:
    """What was at an address; there is one more now. No two threads get the same."""

    def codegen(_: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), _ORDER)

    return types.int64(types.int64), codegen


@intrinsic
def offer_tickets(_: Any, address: Any, first: Any) -> Any:
    """Put the first of a new roll at an address; all that was written before is there for whoever takes one."""

    def codegen(_: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> None:
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("xchg", place, values[1], _ORDER)

    return types.void(types.int64, types.int64), codegen
