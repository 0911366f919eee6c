"""One of an expert's two matrices, as the kernels see it inside a slot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """`act(x @ W.T + b)` for every routed row; all of it fixed when the backend is built.

    n, k:          output and input columns; a gated up projection has n = 2I, gate and up rows interleaved
    k_stored:      k up to a multiple of 128: the stored rows' length, zeros on the right
    weight_offset, scale_offset, bias_offset: bytes from the slot's address, -1 where there is none
    activation:    the kernels' name of it (`_triton.epilogue.ACTIVATIONS`), None for the down projection
    gated, limit, up_shift: as ExpertSpec; False, None and 0 for the down projection
    gather:        rows are tokens, found through token_rows_R; else row r reads row r
    """

    n: int
    k: int
    k_stored: int
    weight_offset: int
    scale_offset: int
    bias_offset: int
    activation: str | None
    gated: bool
    limit: float | None
    up_shift: float
    gather: bool

    @property
    def out_columns(self) -> int:
        """Columns of the result: n, half of it when gated."""
        return self.n // 2 if self.gated else self.n
