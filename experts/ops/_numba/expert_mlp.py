"""Several experts' rows from their tokens to their outputs, compiled for this machine's CPU as one function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from experts.ops._numba.activations import COMPILED
from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import compile_matmul


@cache
def compile_expert_mlp(
    activation: str, *, gated: bool, biased: bool, up_format: str, down_format: str
) -> Callable[..., None]:
    """The compiled `down(act(up(token)))`, see `experts.ops.activations.activate`; it runs without the GIL.

    Arguments:
        experts     int64 [6, M]: addresses of each expert's panels, scales and biases (0 where there are none) of up,
                    then of down
        panels      int64 [2]: of up and of down
        starts      int64 [M + 1]: where each expert's rows start in `token_rows` and `out`
        tokens      float32 [T, H]
        token_rows  int32 [R]: each row's token
        limit       float32, infinite where there is none
        up_shift    float32
        rows, up, inner   float32 [r, H], [r, whole panels], [r, I], to work in: r rows of these experts
        out         float32 [R, whole panels]
    """
    multiply_up = compile_matmul(up_format, biased=biased)
    multiply_down = compile_matmul(down_format, biased=biased)
    act = COMPILED[activation]

    def expert_mlp(
        experts: Any,
        panels: Any,
        starts: Any,
        tokens: Any,
        token_rows: Any,
        limit: Any,
        up_shift: Any,
        rows: Any,
        up: Any,
        inner: Any,
        out: Any,
    ) -> None:
        first, num_rows, hidden_size, size = starts[0], rows.shape[0], rows.shape[1], inner.shape[1]
        for row in range(num_rows):
            token = token_rows[first + row]
            for i in range(hidden_size):
                rows[row, i] = tokens[token, i]
        up_bytes, out_bytes = up.shape[1] * 4, out.shape[1] * 4
        multiply_up(
            *(experts[0], experts[1], experts[2], starts, panels[0], hidden_size),
            *(rows.ctypes.data, hidden_size * 4, up.ctypes.data, up_bytes),
        )
        for row in range(num_rows):
            for i in range(size):
                value = up[row, i]
                if gated:
                    factor = up[row, size + i]
                    value = limit if value > limit else value
                    factor = limit if factor > limit else factor
                    factor = -limit if factor < -limit else factor
                    inner[row, i] = act(value) * (factor + up_shift)
                else:
                    inner[row, i] = act(value)
        multiply_down(
            *(experts[3], experts[4], experts[5], starts, panels[1], size),
            *(inner.ctypes.data, size * 4, out.ctypes.data + first * out_bytes, out_bytes),
        )

    floats, single = types.float32[:, ::1], types.float32
    signature = types.void(
        *(types.int64[:, ::1], types.int64[::1], types.int64[::1]),
        *(floats, types.int32[:], single, single, floats, floats, floats, floats),
    )
    variant = activation, gated, biased, up_format, down_format
    return compiled(expert_mlp, signature, variant=variant, error_model="numpy")
