"""How many cores this process may use, and which are its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable
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


def keep_process_to(cores: frozenset[int]) -> None:
    """Have all threads of this process, and those that they start, run on `cores`."""
    _keep(map(int, os.listdir("/proc/self/task")), cores)


def keep_python_to(cores: frozenset[int], free: Collection[str] = ()) -> None:
    """Have the threads of this process that hold the GIL in turn run on `cores`, and those that they start.

    Handing it to a thread of another core takes longer than what most of them do with it. Threads by a name in `free`
    stay where they are, as do those of OpenMP and Ray.
    """
    threads = [thread for thread in threading.enumerate() if thread.name not in free]
    _keep((thread.native_id for thread in threads if thread.native_id is not None), cores)


def keep_threads_to(cores: frozenset[int], name: str) -> None:
    """Have the threads of this process by that name run on `cores`, if there are any."""
    threads = [thread.native_id for thread in threading.enumerate() if thread.name == name]
    if cores:
        _keep((thread for thread in threads if thread is not None), cores)


def _keep(threads: Iterable[int], cores: frozenset[int]) -> None:
    for thread in threads:
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, cores)
