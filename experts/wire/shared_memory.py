"""Tensors that stay on their machine: files under /dev/shm that both ends of a stream map.

The caller owns the files. One holds a call's hidden states and has room for its answer, and is used again once that
came; gRPC then carries the place alone. A file loses its name with the first answer, when the group has it open, so
that processes that are killed leave none behind.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from experts.errors import RequestError, SegmentUnreachable

DIRECTORY = Path("/dev/shm")

_NAME = re.compile(r"expertmesh-[0-9a-f]{32}")
_LEAST_BYTES = 1 << 20
# Both ends fault the pages in at once, not one by one under the first copy.
_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """`memory` is what lies at `offset` of `segment`."""

    segment: str
    offset: int
    memory: memoryview


class SharedBytes(Protocol):
    """Finds what a message's SharedMemory points at."""

    def view(self, segment: str, offset: int, nbytes: int) -> memoryview:
        """Writable. Raises RequestError where there are no such bytes."""
        ...


class Segment:
    """A file of the caller's, mapped."""

    def __init__(self, nbytes: int) -> None:
        """Raises OSError where the machine has no room for it, or no /dev/shm."""
        self.name = f"expertmesh-{secrets.token_hex(16)}"
        self._linked = True
        file = os.open(DIRECTORY / self.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Reserved here: writing to a page that the machine has not got would kill the process.
            os.posix_fallocate(file, 0, nbytes)
            self._memory = mmap.mmap(file, nbytes, flags=_FLAGS)
        except OSError:
            self.unlink()
            raise
        finally:
            os.close(file)

    def __len__(self) -> int:
        return len(self._memory)

    def place(self, offset: int, nbytes: int) -> Place:
        return Place(segment=self.name, offset=offset, memory=memoryview(self._memory)[offset : offset + nbytes])

    def unlink(self) -> None:
        """Take the name away; whoever has it open keeps the memory."""
        if self._linked:
            self._linked = False
            (DIRECTORY / self.name).unlink(missing_ok=True)


class SegmentPool:
    """The caller's segments of one stream. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._segments: dict[str, Segment] = {}
        self._free: dict[int, list[Segment]] = {}
        self._closed = False

    def take(self, nbytes: int) -> Segment | None:
        """A segment of `nbytes` or more that no call uses; None where the machine has no room for one, or closed."""
        size = max(_LEAST_BYTES, 1 << (nbytes - 1).bit_length())
        with self._lock:
            if self._closed:
                return None
            if free := self._free.get(size):
                return free.pop()
            try:
                segment = Segment(size)
            except OSError:
                return None
            self._segments[segment.name] = segment
            return segment

    def give_back(self, segment: Segment) -> None:
        """The call's answer came, whatever it was: nobody writes to it any more."""
        segment.unlink()
        with self._lock:
            self._free.setdefault(len(segment), []).append(segment)

    def view(self, segment: str, offset: int, nbytes: int) -> memoryview:
        """See SharedBytes."""
        known = self._segments.get(segment)
        if known is None or offset + nbytes > len(known):
            raise RequestError(f"shared: the reply names {nbytes} bytes at {offset} of {segment!r}, not ours", "shared")
        return known.place(offset, nbytes).memory

    def close(self) -> None:
        """Unlink all; the memory goes when nobody uses it."""
        with self._lock:
            self._closed = True
            segments, self._segments, self._free = list(self._segments.values()), {}, {}
        for segment in segments:
            segment.unlink()


class MappedSegments:
    """The group's end: segments that one stream's caller named, open until the stream ends. Not thread-safe."""

    def __init__(self) -> None:
        self._mapped: dict[str, mmap.mmap] = {}

    def view(self, segment: str, offset: int, nbytes: int) -> memoryview:
        """See SharedBytes. Raises SegmentUnreachable where this machine has no such file of ours."""
        memory = self._mapped.get(segment)
        if memory is None:
            memory = self._mapped[segment] = _map(segment)
        if offset + nbytes > len(memory):
            raise RequestError(f"shared: {nbytes} bytes at {offset} of a segment of {len(memory)}", "shared")
        return memoryview(memory)[offset : offset + nbytes]


def _map(segment: str) -> mmap.mmap:
    if not _NAME.fullmatch(segment):
        raise RequestError(f"shared.segment: {segment[:60]!r} is not expertmesh- and 32 hexadecimal digits", "shared")
    try:
        file = os.open(DIRECTORY / segment, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentUnreachable(f"shared.segment: no {segment} on this machine ({error.strerror})", "shared") from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or not status.st_size:
            raise SegmentUnreachable(f"shared.segment: {segment} is not a file of this user's", "shared")
        return mmap.mmap(file, status.st_size, flags=_FLAGS)
    finally:
        os.close(file)
