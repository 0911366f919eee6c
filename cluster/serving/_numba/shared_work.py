"""Pieces of work that two threads in compiled code take from each other, and the clock, for others to call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from experts.ops._numba.object_cache import part

_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.intp))
_recv = types.ExternalFunction("recv", types.intp(types.int32, types.intp, types.uint64, types.int32))
_send = types.ExternalFunction("send", types.intp(types.int32, types.intp, types.uint64, types.int32))
_MONOTONIC = 1
_NO_SIGNAL = 0x4000
# A signal may come between; nothing else goes wrong at one end while somebody is at the other.
_TRIES = 100
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


@part(())
def tell(socket: Any) -> None:
    """Wake whoever hears at the other end, if anybody still is."""
    one = np.ones(1, np.uint8)
    for _ in range(_TRIES):
        if _send(socket, one.ctypes.data, 1, _NO_SIGNAL) == 1:
            return


@part(())
def hear(socket: Any) -> Any:
    """Wait until the other end tells; False where it is closed."""
    one = np.ones(1, np.uint8)
    count = np.int64(-1)
    while count < 0:  # a signal came between
        count = _recv(socket, one.ctypes.data, 1, 0)
    return count == 1


@part(())
def now() -> Any:
    """Seconds, as `time.monotonic` has them."""
    parts = np.empty(2, np.int64)
    _clock_gettime(_MONOTONIC, parts.ctypes.data)
    return parts[0] + parts[1] * 1e-9
