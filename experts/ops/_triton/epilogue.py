"""What a grouped matmul does with its accumulator: scales, bias, activation, store."""

from collections.abc import Mapping

import triton
import triton.language as tl

# Names of config.json to the kernels' own.
ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`ACTIVATION(x)` in float32. NaN stays NaN, which `tl.maximum` would not promise."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) == sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3)
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "quick_gelu":
        return x / (1.0 + tl.exp(-1.702 * x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0.0, 0.0, x * x)
    else:
        tl.static_assert(False, "activation unknown to the Triton kernels")
        return x


@triton.jit
def store_rows(
    acc_RN,
    row_scale_R,
    out_ptr,
    rows_R,
    valid_R,
    n0,
    slot_address,
    N: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    BIAS_OFFSET: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    LIMIT: tl.constexpr,
    UP_SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Stores `act(scale * acc + bias)`; a gated tile holds gate in its even columns and up in its odd ones.

    acc_RN: float32 [BLOCK_R, BLOCK_N]; row_scale_R: float32 [BLOCK_R], or None with unscaled activations.
    SCALE_OFFSET, BIAS_OFFSET: bytes from slot_address to float32 [N], -1 without.
    """
    columns = n0 + tl.arange(0, BLOCK_N)
    inside = columns < N
    if row_scale_R is not None:
        acc_RN = acc_RN * row_scale_R[:, None]
    if SCALE_OFFSET >= 0:
        scale_ptr = (slot_address + SCALE_OFFSET).to(tl.pointer_type(tl.float32))
        acc_RN = acc_RN * tl.load(scale_ptr + columns, mask=inside, other=0.0)[None, :]
    if BIAS_OFFSET >= 0:
        bias_ptr = (slot_address + BIAS_OFFSET).to(tl.pointer_type(tl.float32))
        acc_RN = acc_RN + tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(acc_RN, (BLOCK_R, BLOCK_N // 2, 2)))
        if LIMIT is not None:
            gate = tl.where(gate > LIMIT, LIMIT, gate)
            up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        result = activate(gate, ACTIVATION) * (up + UP_SHIFT)
        columns = n0 // 2 + tl.arange(0, BLOCK_N // 2)
        inside = columns < N // 2
    elif ACTIVATION is not None:
        result = activate(acc_RN, ACTIVATION)
    else:
        result = acc_RN
    out_ptrs = out_ptr + rows_R.to(tl.int64)[:, None] * OUT_STRIDE + columns[None, :]
    tl.store(out_ptrs, result.to(out_ptr.dtype.element_ty), mask=valid_R[:, None] & inside[None, :])
