"""Parts of a batch that are out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router_service.dispatch import GroupPart
from router_service.node_part import NodePart
from router_service.placement import GroupReplica
from router_service.transport.base import PendingReply, TransportError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Flight:
    """A part that is out. version: of the table it was planned with; reply: the error where it was not even sent.

    settle: tells ReplicaChoice that the replica owes nothing any more
    """

    part: GroupPart
    version: int
    replica: GroupReplica | None
    reply: PendingReply | TransportError
    settle: Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NodeFlight:
    """A node's parts, out as one message (`node_part`, `reply`) or each on its own (`flights`); never both."""

    node_part: NodePart | None = None
    version: int
    replicas: tuple[GroupReplica, ...] = ()
    reply: PendingReply | TransportError | None = None
    flights: tuple[Flight, ...] = ()
    settles: tuple[Callable[[], None], ...] = ()

    def cancel(self) -> None:
        """Nobody wants the answers any more; from any thread, and nothing happens to what was received."""
        for settle in (*self.settles, *(each.settle for each in self.flights)):
            settle()
        for reply in (self.reply, *(each.reply for each in self.flights)):
            if reply is not None and not isinstance(reply, TransportError):
                reply.cancel()
