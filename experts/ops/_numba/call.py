"""Compiled functions that call others by their address.

A function that others call is compiled into each of them, all that it calls in turn included: half a minute for what
goes through several layers. By its address it is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


def address_of(function: Callable[..., Any]) -> int:
    """Where the code of a function is that `experts.ops._numba.object_cache.compiled` made; as long as it lives."""
    (result,) = function.overloads.values()  # type: ignore[attr-defined]
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_func_name))


def caller_of(function: Callable[..., Any]) -> Any:
    """`call(address, arguments)` for others to call: any function that has the types of `function`, at an address."""
    (signature,) = function.overloads  # type: ignore[attr-defined]
    (result,) = function.overloads.values()  # type: ignore[attr-defined]
    return_type = result.signature.return_type

    @intrinsic
    def call(_: Any, address: Any, arguments: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, own: Any, values: Sequence[ir.Value]) -> Any:
            given = zip(cgutils.unpack_tuple(builder, values[1]), own.args[1], signature, strict=True)
            casted = [context.cast(builder, value, have, want) for value, have, want in given]
            kind = context.call_conv.get_function_type(return_type, signature)
            code = builder.inttoptr(values[0], kind.as_pointer())
            status, value = context.call_conv.call_function(builder, code, return_type, signature, casted)
            with cgutils.if_unlikely(builder, status.is_error):
                context.call_conv.return_status_propagate(builder, status)
            return value

        return return_type(types.int64, arguments), codegen

    return call
