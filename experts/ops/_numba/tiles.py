"""How rows are cut in tiles."""

from __future__ import annotations

from typing import Any

from numba import njit


@njit(nogil=True)
def even_tile(rows: Any, most: Any) -> Any:
    """Rows of the next tile of at most so many: whole ones, and the last two alike.

    A tile of few rows takes as long as one of twice as many: what it waits for is the sum before the last.
    """
    if rows <= most:
        return rows
    return (rows + 1) // 2 if rows < 2 * most else most
