"""int8 matrices where the CPU multiplies 16 bits: sums are exact, and rows lose what 16 bits cannot hold."""

from __future__ import annotations

import pytest
import torch

from experts.ops._numba import vectors
from experts.ops._numba.pair_matmul import DEPTH, MULTIPLE
from experts.ops.packed_matmul import PAIRS, PackedMatrix, pack_matrix, packed_matmul

pytestmark = pytest.mark.skipif(not vectors.HAS_PAIRS, reason="this CPU has no instruction for pairs of products")
STEPS = 127 << 8


@pytest.fixture(autouse=True)
def _bytes_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bytes would not multiply 16 bits."""
    monkeypatch.setattr(vectors, "HAS_DOTS", False)


def matrix_of(weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> PackedMatrix:
    packed = pack_matrix(weight_OI.to(torch.int8), bias_O, scale_O=torch.ones(len(weight_OI)))
    assert packed.format == PAIRS
    return packed


@pytest.mark.parametrize("num_rows", range(1, 14))
@pytest.mark.parametrize("num_inputs", [4, 60, DEPTH, DEPTH + 4])
def test_whole_steps_are_multiplied_exactly(num_inputs: int, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(num_inputs + num_rows)
    weight_OI = torch.randint(-127, 128, (70, num_inputs), generator=generator)
    steps_RI = torch.randint(-STEPS, STEPS + 1, (num_rows, num_inputs), generator=generator)
    steps_RI[:, 0] = torch.where(torch.arange(num_rows) % 2 == 0, STEPS, -STEPS)  # what a step is worth: 1
    got_RO = packed_matmul(matrix_of(weight_OI), steps_RI.float())
    torch.testing.assert_close(got_RO.double(), (steps_RI @ weight_OI.T).double(), rtol=2e-7, atol=16)


@pytest.mark.parametrize("num_inputs", [DEPTH, 10 * DEPTH])
def test_long_rows_of_the_largest_values(num_inputs: int) -> None:
    weight_OI = torch.full((32, num_inputs), 127)
    weight_OI[1] = -128
    got_RO = packed_matmul(matrix_of(weight_OI), torch.tensor([[1.0], [-1.0]]).expand(2, num_inputs))
    expected_RO = torch.tensor([[127.0, -128.0], [-127.0, 128.0]]) * num_inputs
    torch.testing.assert_close(got_RO[:, :2], expected_RO)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_rows_of_any_size_lose_as_little(size: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weight_OI = torch.randint(-127, 128, (64, 768), generator=generator)
    rows_RI = torch.randn(20, 768, generator=generator) * size
    expected_RO = rows_RI.double() @ weight_OI.double().T
    error_RO = packed_matmul(matrix_of(weight_OI), rows_RI).double() - expected_RO
    assert error_RO.norm() < 5e-5 * expected_RO.norm()


def test_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(4)
    matrix = matrix_of(torch.randint(-127, 128, (70, 3 * DEPTH), generator=generator), torch.randn(70))
    rows_RI = torch.randn(30, 3 * DEPTH, generator=generator)
    together_RO = packed_matmul(matrix, rows_RI)
    for row in range(30):
        assert packed_matmul(matrix, rows_RI[row : row + 1]).equal(together_RO[row : row + 1])


def test_rows_of_zeros_and_what_is_no_number() -> None:
    rows_RI = torch.ones(4, 16)
    rows_RI[0] = 0
    rows_RI[1] = 1e-40
    rows_RI[2, 3] = float("nan")
    rows_RI[3, 3] = float("inf")
    got_RO = packed_matmul(matrix_of(torch.ones(8, 16), torch.ones(8)), rows_RI)
    assert got_RO[:2].equal(torch.ones(2, 8))
    assert not got_RO[2:].isfinite().any()


def test_what_does_not_come_in_fours_is_widened() -> None:
    for num_inputs in range(1, 6):
        packed = pack_matrix(torch.ones(8, num_inputs, dtype=torch.int8), scale_O=torch.ones(8))
        assert (packed.format == PAIRS) == (num_inputs % MULTIPLE == 0)
        assert packed_matmul(packed, torch.ones(3, num_inputs)).allclose(torch.tensor(float(num_inputs)))
