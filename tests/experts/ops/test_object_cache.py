from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import types

from experts.ops._numba.object_cache import compiled, remember_sources

SIGNATURE = types.void(types.int64[::1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EXPERTMESH_CACHE_DIR", str(tmp_path))
    return tmp_path / "compiled"


def adder(term: int) -> Any:
    def add(values: Any) -> None:
        for i in range(len(values)):
            values[i] += term

    return compiled(add, SIGNATURE, variant=(term,))


def check(function: Any, term: int) -> None:
    values = np.arange(3)
    function(values)
    np.testing.assert_array_equal(values, np.arange(3) + term)


def test_what_is_on_disk_is_not_compiled_again(cache: Path) -> None:
    first, second = adder(1), adder(1)
    assert (sum(first.stats.cache_misses.values()), sum(first.stats.cache_hits.values())) == (1, 0)
    assert (sum(second.stats.cache_misses.values()), sum(second.stats.cache_hits.values())) == (0, 1)
    check(first, 1)
    check(second, 1)
    assert len(list(cache.iterdir())) == 1


def test_a_variant_has_code_of_its_own(cache: Path) -> None:
    check(adder(1), 1)
    check(adder(2), 2)
    check(adder(1), 1)
    assert len(list(cache.iterdir())) == 2


def test_variants_have_names_of_their_own(cache: Path) -> None:
    """Code from the disk is linked by name; numba's own numbers are those of the process that compiled it."""
    names = {adder(term).py_func.__qualname__ for term in (1, 2, 3)}
    assert len(names) == 3
    for term in (1, 2, 3):
        (compiled_code,) = adder(term).overloads.values()
        assert any(name in compiled_code.fndesc.qualname for name in names)


def test_other_sources_or_another_processor_are_another_key(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adder(1)
    monkeypatch.setattr("experts.ops._numba.object_cache._basis", lambda: ("another processor",))
    assert adder(1).stats.cache_misses
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"x" * 100])
def test_a_damaged_file_is_compiled_again(cache: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    adder(1)
    (path,) = cache.iterdir()
    path.write_bytes(damage)
    check(adder(1), 1)
    assert f"{path} is damaged" in caplog.text
    assert adder(1).stats.cache_hits


def test_what_others_could_have_written_is_not_read(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    adder(1)
    (path,) = cache.iterdir()
    path.chmod(0o666)
    assert adder(1).stats.cache_misses
    assert f"{path} is not this user's alone" in caplog.text


def test_sources_that_change_after_the_import_do_not_get_the_old_code(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember_sources(__file__)
    adder(1)
    monkeypatch.setattr("experts.ops._numba.object_cache._hash_of", lambda directory: "changed since")
    assert adder(1).stats.cache_hits  # what was imported is what it was
    remember_sources(__file__)  # as the next process does
    assert adder(1).stats.cache_misses
    assert len(list(cache.iterdir())) == 2


def test_a_user_without_a_home_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXPERTMESH_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    check(adder(1), 1)


def test_where_nothing_can_be_written_it_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXPERTMESH_CACHE_DIR", str(tmp_path / "file"))
    check(adder(1), 1)
