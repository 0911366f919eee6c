"""The seam between a router and expert groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from experts.node_call import NodeCall
from experts.spec import ExpertCall
from router_service.placement import GroupReplica


class TransportError(Exception):
    """The replica did not answer: connection lost, refused, or deadline passed. The call may be sent elsewhere."""


class ReplyAbandoned(TransportError):
    """The caller's own time limit passed, or it cancelled: nothing is said about the replica."""


class PendingReply(Protocol):
    """A call that is out."""

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        """Wait for `partial_TH` (float32, [T, H], on CPU or the group's device).

        Raises TransportError where the replica is gone, RequestError where it refused the call
        (ExpertNotResident: plan again with a newer table).
        """
        ...

    def cancel(self) -> None:
        """Nobody wants the answer any more; `result` is not called after this."""
        ...


class Transport(Protocol):
    """Carries calls to group replicas. Thread-safe.

    `timeout_s` bounds a whole call and is carried to the group with it, where the transport can; None: only
    `PendingReply.result` is bounded.
    """

    def send(self, replica: GroupReplica, call: ExpertCall, timeout_s: float | None = None) -> PendingReply:
        """Start a call; never blocks on the network. Raises TransportError at once if the replica is known gone."""
        ...

    def send_node(
        self, replicas: Sequence[GroupReplica], call: NodeCall, timeout_s: float | None = None
    ) -> PendingReply:
        """Start a call to several groups of one node, `replicas` in the order of `call.shares`.

        The hidden states travel to the node once and one partial sum comes back. Raises as `send` does.
        """
        ...

    def forget(self, replica: GroupReplica) -> None:
        """Drop the connection to a replica that left the table; calls that are out to it fail."""
        ...

    def close(self) -> None:
        """Drop every connection."""
        ...


def relay_of(replicas: Sequence[GroupReplica], call: NodeCall) -> GroupReplica:
    """The replica that receives a node's call: the one whose share names no address."""
    (relay,) = (replica for replica, share in zip(replicas, call.shares, strict=True) if not share.address)
    return relay
