"""Partial sums of the groups -> one row per token, added in float32 in the order they are given."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from router_service.slot_index import IntArray


class Combiner:
    """Accumulates partials of one batch. Add them ascending by group: float sums depend on their order."""

    def __init__(self, num_tokens: int, hidden_size: int, device: torch.device) -> None:
        self._shape = (num_tokens, hidden_size)
        self._device = device
        self._sum_TH: torch.Tensor | None = None
        self._owned = False

    def add(self, tokens_T: IntArray | None, partial_TH: torch.Tensor) -> None:
        """Add `partial_TH` (float) to the rows `tokens_T` (int32, distinct; None: all rows)."""
        partial_TH = partial_TH.to(self._device, torch.float32)
        if tokens_T is None:
            if self._sum_TH is None:
                # The first full partial is taken as it is; whoever adds to it first makes the copy.
                self._sum_TH = partial_TH
            elif self._owned:
                self._sum_TH += partial_TH
            else:
                self._sum_TH, self._owned = self._sum_TH + partial_TH, True
            return
        if self._sum_TH is None:
            self._sum_TH, self._owned = torch.zeros(self._shape, device=self._device), True
        elif not self._owned:
            self._sum_TH, self._owned = self._sum_TH.clone(), True
        if partial_TH.is_cuda or partial_TH.shape != (len(tokens_T), self._shape[1]):
            self._sum_TH.index_add_(0, torch.from_numpy(tokens_T).to(self._device), partial_TH)
        else:
            compiled_add_rows()(self._sum_TH.numpy(), tokens_T, partial_TH.contiguous().numpy())

    def result(self, dtype: torch.dtype) -> torch.Tensor:
        """combined_TH in `dtype`; zero rows for tokens without any expert."""
        if self._sum_TH is None:
            return torch.zeros(self._shape, dtype=dtype, device=self._device)
        return self._sum_TH.to(dtype)


@cache
def compiled_add_rows() -> Callable[..., None]:
    """What adds a partial's rows on the CPU; the first call compiles it."""
    # Loads LLVM, which the command line does not need.
    from router_service._numba.add_rows import compile_add_rows

    return compile_add_rows()
