"""How long launches take on the card."""

from __future__ import annotations

from collections.abc import Callable

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError


def milliseconds(run: Callable[[], object], *, repeats: int = 20) -> float:
    """Median over `repeats` runs, by CUDA events, after a first that compiles; launches are left out.

    Infinity where the kernel does not compile or does not fit the card. The card's L2 cache is overwritten before every
    run, as other work would.
    """
    try:
        run()
    except (CompilationError, OutOfResources, PTXASError):
        return float("inf")
    run = captured(run)
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = sorted(begin.elapsed_time(end) for begin, end in events)
    return times[repeats // 2]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run`, which ran before, as a CUDA graph; `run` itself where it cannot be captured."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay
