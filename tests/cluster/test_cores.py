"""A container's limit, as the kernel writes it, against the cores of this machine."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from cluster.cores import own_cores, usable_cores


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", 8),
        ("400000 100000", 4),
        ("250000 100000", 2),
        ("10000 100000", 1),
        ("6400000 100000", 8),
        (None, 8),
    ],
)
def test_the_less_of_affinity_and_limit(
    text: str | None, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    path = tmp_path / "cpu.max"
    if text is not None:
        path.write_text(text + "\n")
    assert usable_cores(path) == cores


@pytest.mark.parametrize(
    ("cores", "sharers", "shares"),
    [
        (range(8), 2, [{0, 1, 2, 3}, {4, 5, 6, 7}]),
        ((1, 5, 9, 10, 12), 3, [{1}, {5, 9}, {10, 12}]),
        (range(2), 2, [{0}, {1}]),
        (range(2), 3, [set(), set(), set()]),
        (range(8), 1, [set()]),
    ],
)
def test_sharers_divide_the_cores(
    cores: Iterable[int], sharers: int, shares: list[set[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(cores))
    assert [own_cores(place, sharers, tmp_path / "none") for place in range(sharers)] == shares
    limit = tmp_path / "cpu.max"
    limit.write_text("100000 100000\n")
    assert not any(own_cores(place, sharers, limit) for place in range(sharers))


@pytest.mark.parametrize(
    ("call", "kept"),
    [
        ("keep_process_to(cores)", "new this bound free"),
        ("keep_python_to(cores, ('free',))", "new this bound"),
        ("keep_threads_to(cores, 'free')", "free"),
        ("keep_threads_to(frozenset(), 'free')", ""),
    ],
)
def test_threads_keep_to_their_cores(call: str, kept: str) -> None:
    script = f"""
import os, threading
from cluster.cores import *
leave, seen, all_cores = threading.Event(), {{}}, os.sched_getaffinity(0)
others = [threading.Thread(target=leave.wait, name=name) for name in ("bound", "free")]
for other in others: other.start()
cores = frozenset({{max(all_cores)}})
{call}
after = threading.Thread(target=lambda: seen.update(new=os.sched_getaffinity(0)))
after.start(); after.join()
seen["this"] = os.sched_getaffinity(0)
for other in others: seen[other.name] = os.sched_getaffinity(other.native_id)
leave.set()
assert seen == {{name: cores if name in {kept.split()} else all_cores for name in seen}}, seen
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
