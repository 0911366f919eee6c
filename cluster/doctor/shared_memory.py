"""Is /dev/shm large enough for Ray's object store?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cluster.doctor.finding import Finding

_GIB = 2**30
# Ray's object store wants shared memory; with less it falls back to files and says so once, then is slow.
_ENOUGH = 1 * _GIB


def check_shared_memory(path: Path = Path("/dev/shm"), *, enough: int = _ENOUGH) -> Iterator[Finding]:
    """Space that is free in `path`, against `enough` bytes."""
    try:
        stat = os.statvfs(path)
    except OSError as error:
        yield Finding(
            check="shared memory",
            status="warn",
            found=f"{path}: {error.strerror}",
            todo="mount a tmpfs there, or expect Ray's object store to be slow",
        )
        return
    free = stat.f_bavail * stat.f_frsize
    if free < enough:
        yield Finding(
            check="shared memory",
            status="warn",
            found=f"{path} has {free / _GIB:.2f} GiB free, {enough / _GIB:g} GiB are wanted",
            todo="docker run --shm-size=4g; in Kubernetes an emptyDir with medium: Memory",
        )
    else:
        yield Finding(check="shared memory", status="ok", found=f"{path} has {free / _GIB:.1f} GiB free")
