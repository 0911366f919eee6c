"""Partial sums of the groups -> one row per token, added in float32 in the order they are given."""

from __future__ import annotations

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
        self._sum_TH.index_add_(0, torch.from_numpy(tokens_T).to(self._device), partial_TH)

    def result(self, dtype: torch.dtype) -> torch.Tensor:
        """combined_TH in `dtype`; zero rows for tokens without any expert."""
        if self._sum_TH is None:
            return torch.zeros(self._shape, dtype=dtype, device=self._device)
        return self._sum_TH.to(dtype)
