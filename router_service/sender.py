"""Sending one part of a plan to a replica of its group, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from router_service.counters import RouterCounters
from router_service.dispatch import GroupPart
from router_service.placement import GroupReplica
from router_service.replica_choice import ReplicaChoice
from router_service.table_view import TableView
from router_service.transport.base import PendingReply, Transport, TransportError


@dataclass(kw_only=True, slots=True)
class Flight:
    """A part that is out. `reply` is the error where it could not even be sent."""

    part: GroupPart
    version: int
    replica: GroupReplica | None
    reply: PendingReply | TransportError


class Sender:
    """Sends parts and receives partials, keeping count and health. Thread-safe."""

    def __init__(
        self, transport: Transport, replicas: ReplicaChoice, counters: RouterCounters, reply_timeout_s: float
    ) -> None:
        self._transport = transport
        self._replicas = replicas
        self._counters = counters
        self._reply_timeout_s = reply_timeout_s

    def send(self, view: TableView, part: GroupPart, hidden_TH: torch.Tensor) -> Flight:
        """Start the call; never raises TransportError, `receive` does."""
        version = view.table.version
        replica = self._replicas.choose(view, part.group)
        if replica is None:
            error = TransportError(f"expert group {part.group} has no replica in placement version {version}")
            return Flight(part=part, version=version, replica=None, reply=error)
        call = part.call(hidden_TH)
        self._counters.call(len(part.token_rows_R), len(call.hidden_TH), call.hidden_TH.nbytes)
        self._replicas.sent(replica, len(part.token_rows_R))
        try:
            reply: PendingReply | TransportError = self._transport.send(replica, call)
        except TransportError as error:
            reply = error
        return Flight(part=part, version=version, replica=replica, reply=reply)

    def receive(self, flight: Flight) -> torch.Tensor:
        """Wait for partial_TH. Raises TransportError (the replica then counts as lost) or RequestError."""
        try:
            if isinstance(flight.reply, TransportError):
                raise flight.reply
            partial_TH = flight.reply.result(self._reply_timeout_s)
        except TransportError:
            if flight.replica is not None:
                self._replicas.lost(flight.replica)
            raise
        finally:
            if flight.replica is not None:
                self._replicas.answered(flight.replica, len(flight.part.token_rows_R))
        self._counters.bytes_received += partial_TH.nbytes
        return partial_TH
