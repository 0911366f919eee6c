"""How rows are cut in tiles, and a tile's code in a version for every number of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit

_I64 = ir.IntType(64)


def emit_versions(builder: ir.IRBuilder, rows: ir.Value, most: int, emit: Callable[[int], None]) -> None:
    """Code that does what `emit` emits for as many rows as there are, up to `most`; nothing for other numbers."""
    done = builder.append_basic_block("done")
    versions = builder.switch(rows, done)
    for number in range(1, most + 1):
        version = builder.append_basic_block(f"rows_{number}")
        versions.add_case(ir.Constant(_I64, number), version)
        builder.position_at_end(version)
        emit(number)
        builder.branch(done)
    builder.position_at_end(done)


@njit(nogil=True)
def even_tile(rows: Any, most: Any) -> Any:
    """Rows of the next tile of at most so many: whole ones, and the last two alike.

    A tile of few rows takes as long as one of twice as many: what it waits for is the sum before the last.
    """
    if rows <= most:
        return rows
    return (rows + 1) // 2 if rows < 2 * most else most
