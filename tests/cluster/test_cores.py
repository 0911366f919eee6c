"""A container's limit, as the kernel writes it, against the cores of this machine."""

import os
from pathlib import Path

import pytest

from cluster.cores import usable_cores


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
