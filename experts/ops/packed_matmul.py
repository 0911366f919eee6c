"""Rows times matrices that were packed for this machine's CPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

# What a packed matrix may hold.
HELD = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int8: "int8"}


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A weight [O, I] and its bias.

    panels:   [P, I, L]: a panel's L outputs lie beside each other, zeros after the last of O
    scale_PL: float32, what a step of an int8 weight is worth; None for other dtypes
    bias_O:   float32
    """

    panels: torch.Tensor
    num_outputs: int
    scale_PL: torch.Tensor | None
    bias_O: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes that the weight takes, and that a product reads."""
        return self.panels.nbytes

    def new_result(self, num_rows: int) -> torch.Tensor:
        """A tensor, float32 [num_rows, O] of no particular values, that `packed_matmul` can write to."""
        return torch.empty(num_rows, len(self.panels) * self.panels.shape[2])[:, : self.num_outputs]


def pack_matrix(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None, *, scale_O: torch.Tensor | None = None
) -> PackedMatrix:
    """`weight_OI`, in a dtype of HELD, laid out for `packed_matmul`, which is compiled for that dtype now."""
    panel, _ = _compiled(weight_OI.dtype)
    num_outputs, num_inputs = weight_OI.shape
    padding = -num_outputs % panel
    panels = F.pad(weight_OI, (0, 0, 0, padding)).view(-1, panel, num_inputs).transpose(1, 2).contiguous()
    return PackedMatrix(
        panels=panels,
        num_outputs=num_outputs,
        scale_PL=None if scale_O is None else F.pad(scale_O.float(), (0, padding)).view(-1, panel),
        bias_O=None if bias_O is None else bias_O.float(),
    )


def packed_matmul(
    matrices: Sequence[PackedMatrix], rows_RI: torch.Tensor, counts: Sequence[int], out_RO: torch.Tensor | None = None
) -> torch.Tensor:
    """`rows @ weight.T + bias`: the first `counts[0]` rows with the first matrix, and so on. float32 [R, O].

    matrices: at least one, all of one shape and dtype
    rows_RI:  float32, R the sum of `counts`
    out_RO:   where the result goes, of `new_result`, or rows of that

    Weights are widened to float32 as they are read, and sums are float32, in ascending order of inputs: a row's
    result does not depend on the other rows. It runs in the calling thread, without the GIL.
    """
    some = matrices[0]
    num_panels, num_inputs, _ = some.panels.shape
    if out_RO is None:
        out_RO = some.new_result(len(rows_RI))
    if rows_RI.stride(1) != 1:
        rows_RI = rows_RI.contiguous()
    assert rows_RI.shape == (sum(counts), num_inputs)
    assert rows_RI.dtype is torch.float32
    _, matmul = _compiled(some.panels.dtype)
    matmul(
        _addresses([matrix.panels for matrix in matrices]),
        np.array([0, *itertools.accumulate(counts)], dtype=np.int64),
        _addresses([matrix.scale_PL for matrix in matrices if matrix.scale_PL is not None]),
        num_panels,
        num_inputs,
        rows_RI.data_ptr(),
        rows_RI.stride(0) * 4,
        out_RO.data_ptr(),
        out_RO.stride(0) * 4,
    )
    if some.bias_O is not None:
        for matrix, part_RO in zip(matrices, torch.split_with_sizes(out_RO, list(counts)), strict=True):
            assert matrix.bias_O is not None
            part_RO.add_(matrix.bias_O)
    return out_RO


def _addresses(tensors: Sequence[torch.Tensor]) -> npt.NDArray[np.int64]:
    return np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)


@cache
def _compiled(dtype: torch.dtype) -> tuple[int, Callable[..., None]]:
    """A panel's outputs, and the product."""
    # Loads LLVM, which a process without experts on CPU does not need.
    from experts.ops._numba.packed_matmul import PANEL, compile_matmul

    return PANEL, compile_matmul(HELD[dtype])
