"""Every error that a user or a failing machine can cause, as one tree.

MeshError (ValueError)
├── ConfigError          a key of mesh.yaml or a flag of the command line
├── CheckpointError      a file or a tensor of a checkpoint
├── RequestError         a field of an HTTP or gRPC request
│   ├── QueueFull        the engine's waiting queue is full; carries when to try again
│   ├── SegmentUnreachable  a call's data is in memory that this machine does not share
│   └── ExpertNotResident   a call names an expert that this group does not hold (any more)
└── GroupUnavailable     an expert group did not answer and did not come back in time

A message says what was wrong, where, and what to do. Invariants of ours are `assert`ed, not raised.
"""

from __future__ import annotations


class MeshError(ValueError):
    """Root of the tree."""


class ConfigError(MeshError):
    """A key of mesh.yaml or a flag is unknown, mistyped or impossible on this cluster."""


class CheckpointError(MeshError):
    """A checkpoint's file or tensor is missing, truncated, mis-shaped or of a family that we cannot read."""


class RequestError(MeshError):
    """A request's field cannot be accepted. `field` is its name as the caller wrote it."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class QueueFull(RequestError):
    """The waiting queue is full; `retry_after_s` is when a place is likely."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ExpertNotResident(RequestError):
    """A call named an expert that the group does not hold: the caller's placement table is out of date."""


class SegmentUnreachable(RequestError):
    """A call's data lies in shared memory that this process cannot open: it must travel in the message."""


class GroupUnavailable(MeshError):
    """Expert group `group` did not answer within the recovery timeout."""

    def __init__(self, message: str, group: int) -> None:
        super().__init__(message)
        self.group = group
