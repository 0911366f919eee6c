"""A CUDA graph of one decode size: launches of a whole expert pass as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class DecodeGraph:
    """`forward` captured for at most `num_rows` rows (and tokens) in at most `num_groups` groups.

    Smaller calls are padded: groups beyond the call's are empty, rows beyond the last offset belong to nobody.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        num_rows: int,
        num_groups: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        resident_slot: int,
        pool: Any,
    ) -> None:
        """Runs `forward` once, then captures it. resident_slot: any slot that holds weights. pool: of
        `torch.cuda.graph_pool_handle()`, shared by graphs that never run at one time."""
        self._hidden_TH = torch.zeros((num_rows, hidden_size), dtype=dtype, device=device)
        self._slots_S = torch.full((num_groups,), resident_slot, dtype=torch.int32, device=device)
        self._offsets_S1 = torch.zeros(num_groups + 1, dtype=torch.int32, device=device)
        self._offsets_S1[1:] = num_rows
        self._token_rows_R = torch.arange(num_rows, dtype=torch.int32, device=device)
        self._weights_R = torch.ones(num_rows, dtype=torch.float32, device=device)
        inputs = (self._hidden_TH, self._slots_S, self._offsets_S1, self._token_rows_R, self._weights_R)
        # Kernels load on their first launch, which must not fall into the capture.
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            forward(*inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._partial_TH = forward(*inputs)

    def replay(
        self,
        hidden_TH: torch.Tensor,
        slots_S: torch.Tensor,
        offsets_S1: torch.Tensor,
        token_rows_R: torch.Tensor,
        weights_R: torch.Tensor,
    ) -> torch.Tensor:
        """As `forward`; the result is overwritten by the next replay of any graph of the same pool."""
        num_groups = slots_S.numel()
        self._hidden_TH[: len(hidden_TH)].copy_(hidden_TH, non_blocking=True)
        self._slots_S[:num_groups].copy_(slots_S, non_blocking=True)
        self._offsets_S1[: num_groups + 1].copy_(offsets_S1, non_blocking=True)
        self._offsets_S1[num_groups + 1 :].copy_(self._offsets_S1[num_groups], non_blocking=True)
        self._token_rows_R[: len(token_rows_R)].copy_(token_rows_R, non_blocking=True)
        self._weights_R[: len(weights_R)].copy_(weights_R, non_blocking=True)
        self._graph.replay()
        return self._partial_TH[: len(hidden_TH)]
