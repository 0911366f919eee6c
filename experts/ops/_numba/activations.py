"""`experts.ops.activations`, compiled for this machine's CPU: functions of one float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts: products with the first are exact (Cody and Waite 1980).
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
# exp(r) for |r| <= ln 2 / 2: coefficients of r^7 to r^2 (Cephes, expf.c).
EXP = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)
# Added and taken away again, it leaves a float32 without its fraction.
ROUND = np.float32(1.5 * 2**23)
LEAST, _MOST = np.float32(-87.0), np.float32(88.0)
_HALF, _ONE = np.float32(0.5), np.float32(1.0)


@intrinsic
def _power_of_two(_: Any, exponent: Any) -> Any:
    """2.0 ** exponent for an int32 in float32's range."""

    def codegen(_: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[ir.Value]) -> ir.Value:
        integer = ir.IntType(32)
        bits = builder.shl(builder.add(values[0], ir.Constant(integer, 127)), ir.Constant(integer, 23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), codegen


@njit(inline="always")
def exp(x):  # type: ignore[no-untyped-def]
    x = x if x > LEAST else LEAST
    x = x if x < _MOST else _MOST
    whole = (x * LOG2_E + ROUND) - ROUND
    rest = x - whole * LN2_HIGH - whole * LN2_LOW
    value = EXP[0]
    value = value * rest + EXP[1]
    value = value * rest + EXP[2]
    value = value * rest + EXP[3]
    value = value * rest + EXP[4]
    value = value * rest + EXP[5]
    return (value * rest * rest + rest + _ONE) * _power_of_two(np.int32(whole))


@njit(inline="always")
def _silu(x):  # type: ignore[no-untyped-def]
    return x / (_ONE + exp(-x))


@njit(inline="always")
def _gelu(x):  # type: ignore[no-untyped-def]
    return np.float32(x * _HALF * np.float32(math.erfc(x * np.float32(-0.7071067811865476))))


@njit(inline="always")
def _gelu_tanh(x):  # type: ignore[no-untyped-def]
    # (1 + tanh y) / 2 = 1 / (1 + exp(-2 y))
    return x / (_ONE + exp(np.float32(-1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)))


@njit(inline="always")
def _quick_gelu(x):  # type: ignore[no-untyped-def]
    return x / (_ONE + exp(np.float32(-1.702) * x))


@njit(inline="always")
def _relu(x):  # type: ignore[no-untyped-def]
    return x if not x < np.float32(0) else np.float32(0)


@njit(inline="always")
def _relu2(x):  # type: ignore[no-untyped-def]
    return _relu(x) * _relu(x)


COMPILED: Mapping[str, Callable[..., Any]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu2": _relu2,
}
