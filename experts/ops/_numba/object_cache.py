"""Compiled functions kept on disk: a process that starts again, or an actor that Ray restarts, need not compile them.

Numba has a cache of its own, which looks at one file's date only; these functions are made of several files, and of
what they close over.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.registry import cpu_target
from numba.core.serialize import dumps

from experts.ops.cache_directory import cache_directory

log = logging.getLogger(__name__)

# A function's `fastmath` by which its sums are taken in vectors; NaN and infinity still mean what they mean.
SUMS = {"contract", "nsz", "reassoc"}


def compiled(
    function: Callable[..., None], signature: Any, *, variant: tuple[object, ...], **options: Any
) -> Callable[..., None]:
    """`numba.njit(signature, nogil=True, **options)(function)`, from disk where this machine has compiled it before.

    variant: what `function` closes over, apart from what this package's sources and those beside it say.
    """
    key = hashlib.sha256(
        repr((_basis(), _sources_beside(function), function.__name__, signature, variant, options)).encode()
    ).hexdigest()
    dispatcher = part(variant, **options)(function)
    with suppress(RuntimeError):  # a user without a home: nothing is kept
        dispatcher._cache = _ObjectCache(cache_directory() / "compiled" / f"{function.__name__}-{key}")
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    result: Callable[..., None] = dispatcher
    return result


def part(variant: tuple[object, ...], **options: Any) -> Callable[[Callable[..., None]], Any]:
    """`numba.njit(nogil=True, **options)` for a function that compiled ones call, and that closes over `variant`.

    Object code of several processes is linked by name, and numba numbers functions anew in each: what differs must
    have another name.
    """

    def decorate(function: Callable[..., None]) -> Any:
        digest = hashlib.sha256(repr(variant).encode()).hexdigest()
        function.__qualname__ = f"{function.__name__}_{digest[:16]}"
        return numba.njit(nogil=True, **options)(function)

    return decorate


def remember_sources(package_file: str) -> str:
    """A package's sources as they are when it is imported, which is what will be compiled, whatever changes later.

    Returns their hash, for the `variant` of functions of other packages that are made of these.
    """
    directory = Path(package_file).parent
    _SOURCES[directory] = _hash_of(directory)
    return _SOURCES[directory]


def _sources_beside(function: Callable[..., None]) -> str:
    directory = Path(function.__code__.co_filename).parent
    return _SOURCES.get(directory) or _hash_of(directory)


def _hash_of(directory: Path) -> str:
    sources = hashlib.sha256()
    for path in sorted(directory.glob("*.py")):
        sources.update(path.read_bytes())
    return sources.hexdigest()


_HERE = Path(__file__).parent
_SOURCES = {_HERE: _hash_of(_HERE)}


@cache
def _basis() -> tuple[object, ...]:
    """What else makes the same function compile to other code: what it is made of here, compiler, processor."""
    versions = sys.version, numba.__version__, llvmlite.__version__
    return _SOURCES[_HERE], *versions, *cpu_target.target_context.codegen().magic_tuple()


class _ObjectCache(_Cache):  # type: ignore[misc]
    """One function's object code: a file of its SHA-256 and itself, written in one step."""

    cache_path = None

    def __init__(self, path: Path) -> None:
        self._path = path

    def load_overload(self, _: Any, target: Any) -> Any:
        """Numba's record of the compiled function, or None."""
        target.refresh()
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                # Nobody else may have written it: it is unpickled, as numba's own cache does.
                if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                    log.warning("%s is not this user's alone, and not used", self._path)
                    return None
                content = file.read()
        except OSError:
            return None
        digest, code = content[:32], content[32:]
        try:
            if hashlib.sha256(code).digest() != digest:
                raise ValueError("its bytes are not those that were written")
            return CompileResult._rebuild(target, *pickle.loads(code))
        except Exception as error:
            log.warning("%s is damaged, compiling again: %s", self._path, error)
            return None

    def save_overload(self, _: Any, result: Any) -> None:
        """Keep `result`; where nothing can be written, the next process compiles again."""
        code = dumps(result._reduce())
        draft = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.touch(0o600)
            draft.write_bytes(hashlib.sha256(code).digest() + code)
            draft.replace(self._path)
        except OSError as error:
            log.info("compiled code is not kept: %s", error)

    def enable(self) -> None:
        """Part of numba's interface."""

    def disable(self) -> None:
        """Part of numba's interface."""

    def flush(self) -> None:
        """Part of numba's interface."""
