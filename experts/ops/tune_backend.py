"""Times tile candidates with a backend's own experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from experts.ops._triton.timing import milliseconds
from experts.ops.tile_config import TileConfig
from experts.ops.triton_backend import TritonBackend


class TuneStep(NamedTuple):
    """A choice that was made: the fastest tiles of a projection for up to `rows` rows an expert."""

    projection: str
    rows: int
    config: TileConfig
    ms: float


def tune_backend(
    backend: TritonBackend,
    slots: Sequence[int],
    *,
    dtype: torch.dtype,
    measure: Callable[[Callable[[], object]], float] = milliseconds,
) -> Iterator[TuneStep]:
    """Time every candidate of both projections and remember the fastest on disk.

    slots: hold experts; all of them get rows in every call, so they should be as many as a layer of the group has.
    """
    device = backend.device
    slots_S = torch.tensor(list(slots), dtype=torch.int32, device=device)
    for name, projection in zip(("up", "down"), backend.projections, strict=True):

        def time(config: TileConfig, rows: int, projection=projection) -> float:  # type: ignore[no-untyped-def]
            num_rows = rows * len(slots)
            offsets_S1 = torch.arange(0, num_rows + 1, rows, dtype=torch.int32, device=device)
            token_rows_R = torch.arange(num_rows, dtype=torch.int32, device=device)
            x = torch.randn((num_rows, -(-projection.k // 16) * 16), device=device).to(dtype)[:, : projection.k]
            tiles = backend.tiles(slots_S, offsets_S1, num_rows, config)
            return measure(lambda: backend.project(projection, config, x, token_rows_R, tiles))

        for rows, config, ms in backend.tuning.tune(projection, time):
            yield TuneStep(name, rows, config, ms)
