"""How many cores this process may use, and which are its own."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(cpu_max: Path = CPU_MAX) -> int:
    """At least 1: the cores that it may run on, or the whole ones of a container's limit where that is less.

    cpu_max: "QUOTA PERIOD" in microseconds, or "max PERIOD" without a limit (cgroup v2); may be absent
    """
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def own_cores(place: int, sharers: int, cpu_max: Path = CPU_MAX) -> frozenset[int]:
    """The part of this process's cores that is the `place`-th of `sharers`'; none where there is nothing to divide:
    fewer cores than sharers, one alone, or a container's limit, which names no cores."""
    cores = sorted(os.sched_getaffinity(0))
    if not 2 <= sharers <= len(cores) or usable_cores(cpu_max) < len(cores):
        return frozenset()
    return frozenset(cores[len(cores) * place // sharers : len(cores) * (place + 1) // sharers])


def keep_to(cores: frozenset[int]) -> None:
    """Have all threads of this process, and those that they start, run on `cores`; anywhere as before if none."""
    for thread in os.listdir("/proc/self/task") if cores else ():
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), cores)
