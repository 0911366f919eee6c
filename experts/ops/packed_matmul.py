"""Rows times matrices that were packed for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from experts.ops.cpu_threads import ThreadTeam
from experts.ops.huge_memory import huge_empty

# Reading a matrix takes about as long as multiplying so many rows with it.
ROWS_A_READ = 8
# Bytes to read, or as much arithmetic, that pay for waking a second thread.
_SHARED_WORK = 8 << 20
# What a packed matrix may hold.
HELD = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int8: "int8"}
DOTS, PAIRS = "int8_dots", "int8_pairs"
"""What compiled code calls int8 where it multiplies bytes, see `experts.ops._numba.dot_matmul`, and where it multiplies
16 bits, see `experts.ops._numba.pair_matmul`."""


class _Product(NamedTuple):
    """What a call of the compiled product needs of a matrix."""

    run: Callable[..., None]
    panels: npt.NDArray[np.int64]
    scales: npt.NDArray[np.int64]
    biases: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A weight [O, I] and its bias.

    panels:   [P, I, L]: a panel's L outputs lie beside each other, zeros after the last of O; in bfloat16 the first
              half of them in turns with the second; in DOTS uint8, int8 with 128 added, where four inputs of each
              output lie beside each other; in PAIRS two
    format:   what compiled code calls the dtype
    scale_PL: float32, what a step of an int8 weight is worth; None for other dtypes
    bias_PL:  float32
    """

    panels: torch.Tensor
    format: str
    num_outputs: int
    scale_PL: torch.Tensor | None
    bias_PL: torch.Tensor | None

    @property
    def kind(self) -> tuple[str, bool]:
        """What compiled code has to know: the format, and whether there are biases."""
        return self.format, self.bias_PL is not None

    def whole(self, *sizes: int) -> bool:
        """Whether so many outputs fill their panels."""
        return all(size % self.panels.shape[2] == 0 for size in sizes)

    @property
    def num_columns(self) -> int:
        """Of the result: O, and up to a whole panel."""
        return self.panels.shape[0] * self.panels.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes, and that a product reads."""
        return self.panels.nbytes

    def worth_sharing(self, num_rows: int) -> bool:
        """Whether a product with so many rows pays for waking a second thread."""
        return self.nbytes * (1 + num_rows / ROWS_A_READ) >= _SHARED_WORK

    @cached_property
    def product(self) -> _Product:
        """Compiled when it is first asked for, half a second for a dtype."""
        # Loads LLVM, which a process without experts on CPU does not need.
        from experts.ops._numba.packed_matmul import compile_matmul

        addresses = (np.array([address]) for address in self.addresses())
        return _Product(compile_matmul(self.format, biased=self.bias_PL is not None), *addresses)

    def addresses(self) -> tuple[int, int, int]:
        """Of panels, scales and biases, 0 where there are none."""
        scale, bias = self.scale_PL, self.bias_PL
        return self.panels.data_ptr(), 0 if scale is None else scale.data_ptr(), 0 if bias is None else bias.data_ptr()


def pack_matrix(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, *, scale_O: torch.Tensor | None = None
) -> PackedMatrix:
    """`weight_OI`, in a dtype of HELD, laid out in panels for this CPU; the product is compiled before any call."""
    # Loads LLVM, which a process without experts on CPU does not need.
    from experts.ops._numba import dot_matmul, pair_matmul
    from experts.ops._numba.vectors import HAS_DOTS, HAS_PAIRS, PANEL

    num_outputs, num_inputs = weight_OI.shape
    padding = -num_outputs % PANEL
    panels_PIL = F.pad(weight_OI, (0, 0, 0, padding)).reshape(-1, PANEL, num_inputs).transpose(1, 2)
    if weight_OI.dtype is torch.bfloat16:
        panels_PIL = panels_PIL.reshape(-1, num_inputs, 2, PANEL // 2).transpose(2, 3).reshape(-1, num_inputs, PANEL)
    held = HELD[weight_OI.dtype]
    if held == "int8" and HAS_DOTS and num_inputs % dot_matmul.INPUTS == 0 and num_inputs <= dot_matmul.MOST_INPUTS:
        held = DOTS
        panels_PIL = (_beside_each_other(panels_PIL, dot_matmul.INPUTS).short() + 128).to(torch.uint8)
    elif held == "int8" and HAS_PAIRS and num_inputs % pair_matmul.MULTIPLE == 0:
        held = PAIRS
        panels_PIL = _beside_each_other(panels_PIL, pair_matmul.INPUTS)
    matrix = PackedMatrix(
        panels=huge_empty(tuple(panels_PIL.shape), panels_PIL.dtype).copy_(panels_PIL),
        format=held,
        num_outputs=num_outputs,
        scale_PL=None if scale_O is None else F.pad(scale_O.float(), (0, padding)).view(-1, PANEL),
        bias_PL=None if bias_O is None else F.pad(bias_O.float(), (0, padding)).view(-1, PANEL),
    )
    _ = matrix.product
    return matrix


def _beside_each_other(panels_PIL: torch.Tensor, inputs: int) -> torch.Tensor:
    """The same shape, with so many inputs of an output in a row."""
    num_panels, num_inputs, panel = panels_PIL.shape
    return panels_PIL.reshape(num_panels, -1, inputs, panel).transpose(2, 3).reshape(num_panels, num_inputs, panel)


def pack_exactly(weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> PackedMatrix:
    """A float32 weight; in half the bytes where its values are bfloat16 numbers, as most checkpoints' are."""
    narrow_OI = weight_OI.bfloat16()
    return pack_matrix(narrow_OI if narrow_OI.float().equal(weight_OI) else weight_OI, bias_O)


def packed_matmul(matrix: PackedMatrix, rows_RI: torch.Tensor, team: ThreadTeam | None = None) -> torch.Tensor:
    """`rows @ weight.T + bias`, float32 [R, O], for float32 rows.

    team: threads that share the outputs where there is enough to do

    Weights are widened to float32 as they are read, and sums are float32, in ascending order of inputs (in DOTS and
    PAIRS rows are rounded to 16 bits, and sums are exact): a row's result depends neither on the other rows nor on the
    threads. The GIL is not held.
    """
    num_panels, num_inputs, panel = matrix.panels.shape
    assert rows_RI.dtype is torch.float32
    assert rows_RI.shape[1] == num_inputs
    rows_RI = rows_RI.contiguous()
    num_rows, columns, product = rows_RI.shape[0], matrix.num_columns, matrix.product
    out_RP = torch.empty(num_rows, columns)
    starts = np.array([0, num_rows])
    pieces = 1 if team is None or not matrix.worth_sharing(num_rows) else team.num_threads

    def run(piece: int) -> None:
        first, last = num_panels * piece // pieces, num_panels * (piece + 1) // pieces
        column_bytes = first * panel * 4
        product.run(
            product.panels + first * num_inputs * panel * matrix.panels.itemsize,
            product.scales + column_bytes,
            product.biases + column_bytes,
            starts,
            last - first,
            num_inputs,
            rows_RI.data_ptr(),
            num_inputs * 4,
            out_RP.data_ptr() + column_bytes,
            columns * 4,
        )

    if team is None or pieces == 1:
        rows, out = rows_RI.data_ptr(), out_RP.data_ptr()
        product.run(*product[1:], starts, num_panels, num_inputs, rows, num_inputs * 4, out, columns * 4)
    else:
        team.run(run, pieces)
    return out_RP if columns == matrix.num_outputs else out_RP[:, : matrix.num_outputs]
