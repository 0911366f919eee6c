from __future__ import annotations

from pathlib import Path

import pytest

from cluster.doctor.shared_memory import check_shared_memory


@pytest.mark.parametrize(("enough", "status"), [(1, "ok"), (2**60, "warn")])
def test_against_what_is_wanted(tmp_path: Path, enough: int, status: str) -> None:
    (finding,) = check_shared_memory(tmp_path, enough=enough)
    assert finding.status == status


def test_where_there_is_none(tmp_path: Path) -> None:
    (finding,) = check_shared_memory(tmp_path / "shm")
    assert finding.status == "warn"
