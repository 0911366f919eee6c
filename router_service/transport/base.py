"""The seam between a router and expert groups."""

from __future__ import annotations

from typing import Protocol

import torch

from experts.spec import ExpertCall
from router_service.placement import GroupReplica


class TransportError(Exception):
    """The replica did not answer: connection lost, refused, or deadline passed. The call may be sent
    elsewhere."""


class PendingReply(Protocol):
    """A call that is out."""

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        """Wait for `partial_TH` (float32, [T, H], on CPU or the group's device).

        Raises TransportError where the replica is gone, RequestError where it refused the call
        (ExpertNotResident: plan again with a newer table).
        """
        ...


class Transport(Protocol):
    """Carries calls to group replicas. Thread-safe."""

    def send(self, replica: GroupReplica, call: ExpertCall) -> PendingReply:
        """Start a call; never blocks on the network. Raises TransportError at once if the replica is known
        gone."""
        ...

    def forget(self, replica: GroupReplica) -> None:
        """Drop the connection to a replica that left the table."""
        ...

    def close(self) -> None:
        """Drop every connection."""
        ...
