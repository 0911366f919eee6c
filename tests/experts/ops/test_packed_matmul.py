"""Products with packed matrices against float64, whatever the tiles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from experts.ops.packed_matmul import DOTS, HELD, PAIRS, PackedMatrix, pack_matrix, packed_matmul


class Layer:
    """A random matrix and what it stands for, in float64."""

    def __init__(self, num_outputs: int, num_inputs: int, dtype: torch.dtype, generator: torch.Generator) -> None:
        weight = torch.randn(num_outputs, num_inputs, generator=generator)
        self._bias: torch.Tensor | None = None
        if dtype is torch.int8:
            weight, scale_O = (weight * 40).round().clamp(-127, 127), torch.rand(num_outputs, generator=generator) + 0.1
            self.packed: PackedMatrix = pack_matrix(weight.to(dtype), scale_O=scale_O)
            self._weight = weight.double() * scale_O[:, None]
        else:
            bias = torch.randn(num_outputs, generator=generator)
            self.packed = pack_matrix(weight.to(dtype), bias)
            self._weight, self._bias = weight.to(dtype).double(), bias.double()

    def exactly(self, rows_RI: torch.Tensor) -> torch.Tensor:
        return F.linear(rows_RI.double(), self._weight, self._bias)


@pytest.mark.parametrize("dtype", HELD)
@given(
    num_outputs=st.integers(1, 150),
    num_inputs=st.integers(1, 90),
    num_rows=st.integers(0, 40),
    gap=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_equals_float64(
    dtype: torch.dtype, num_outputs: int, num_inputs: int, num_rows: int, gap: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = Layer(num_outputs, num_inputs, dtype, generator)
    rows_RI = torch.randn(num_rows, num_inputs + gap, generator=generator)[:, :num_inputs]
    got, expected = packed_matmul(layer.packed, rows_RI), layer.exactly(rows_RI)
    assert got.dtype is torch.float32
    assert got.shape == expected.shape
    # Where integers are multiplied, rows are rounded to 16 bits.
    error = 5e-5 if layer.packed.format in (DOTS, PAIRS) else 1e-6
    assert (got - expected).norm() <= error * (expected.norm() + num_inputs)


@pytest.mark.parametrize("dtype", HELD)
@pytest.mark.parametrize("num_rows", [1, 100])
def test_inputs_in_more_than_one_piece(dtype: torch.dtype, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(7)
    layer = Layer(40, 3001, dtype, generator)
    rows_RI = torch.randn(num_rows, 3001, generator=generator)
    expected = layer.exactly(rows_RI)
    assert (packed_matmul(layer.packed, rows_RI) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", HELD)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    matrix = Layer(70, 3001, dtype, generator).packed
    rows_RI = torch.randn(100, 3001, generator=generator)
    together = packed_matmul(matrix, rows_RI)
    for row in range(100):
        assert packed_matmul(matrix, rows_RI[row : row + 1]).equal(together[row : row + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_inf_pass(dtype: torch.dtype) -> None:
    weight = torch.ones(3, 4)
    weight[0, 1], weight[1, 2] = float("nan"), float("inf")
    out = packed_matmul(pack_matrix(weight.to(dtype)), torch.tensor([[1.0, 1.0, 2.0, 3.0]]))
    assert out[0, 0].isnan()
    assert out[0, 1] == float("inf")
    assert out[0, 2] == 7
