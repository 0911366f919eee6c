"""How rows are cut in tiles."""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(nogil=True)
def even_tile(rows: Any, most: Any) -> Any:
    """Rows of the next tile of at most so many: with as few tiles as there are, none is much smaller than another.

    A tile of few rows takes as long as one of twice as many: what it waits for is the sum before the last.
    """
    tiles = (rows + most - 1) // most
    return (rows + tiles - 1) // tiles
