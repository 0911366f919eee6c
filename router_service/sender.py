"""Sending the parts of a plan to replicas of their groups, and receiving what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from router_service.counters import RouterCounters
from router_service.dispatch import GroupPart
from router_service.node_part import NodePart, bundle, num_distinct_tokens
from router_service.placement import GroupReplica
from router_service.replica_choice import ReplicaChoice
from router_service.table_view import TableView
from router_service.transport.base import PendingReply, ReplyAbandoned, Transport, TransportError


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


class Sender:
    """Sends parts and receives partials, keeping count and health. Thread-safe.

    node: the node that the router runs on; the groups of any other node share a message. None: never.
    """

    def __init__(
        self, transport: Transport, replicas: ReplicaChoice, counters: RouterCounters, node: str | None
    ) -> None:
        self._transport = transport
        self._replicas = replicas
        self._counters = counters
        self._node = node

    def send_all(
        self,
        view: TableView,
        parts: Sequence[GroupPart],
        hidden_TH: torch.Tensor,
        timeout_s: float | None,
    ) -> list[NodeFlight]:
        """Start all calls of a batch, nodes in the order of their first group."""
        by_node: dict[str, list[tuple[GroupPart, GroupReplica | None]]] = {}
        for part in parts:
            replica = self._replicas.choose(view, part.group)
            by_node.setdefault(replica.node if replica is not None else "", []).append((part, replica))
        sent: list[NodeFlight] = []
        try:
            for node, chosen in by_node.items():
                sent.append(self._send_node(view, node, chosen, hidden_TH, timeout_s))
        except BaseException:
            for flight in sent:
                self.cancel(flight)
            raise
        return sent

    def _send_node(
        self,
        view: TableView,
        node: str,
        chosen: list[tuple[GroupPart, GroupReplica | None]],
        hidden_TH: torch.Tensor,
        timeout_s: float | None,
    ) -> NodeFlight:
        version = view.table.version
        parts = [part for part, _ in chosen]
        replicas = tuple(replica for _, replica in chosen if replica is not None)
        if self._node in (None, node) or len(replicas) < 2 or len(replicas) < len(chosen):
            self._counters.node(num_distinct_tokens(parts, len(hidden_TH)))
            return NodeFlight(version=version, flights=self._fly_each(version, chosen, hidden_TH, timeout_s))
        node_part = bundle(parts, len(hidden_TH))
        self._counters.node(node_part.num_tokens)
        relay = self._replicas.least_loaded(replicas)
        addresses = ["" if replica is relay else replica.address or replica.actor for replica in replicas]
        call = node_part.call(hidden_TH, addresses)
        self._counters.call(
            sum(len(part.token_rows_R) for part in node_part.parts),
            node_part.num_tokens,
            call.hidden_TH.nbytes,
            remote=True,
        )
        settles = tuple(
            self._replicas.sent(replica, len(part.token_rows_R))
            for replica, part in zip(replicas, node_part.parts, strict=True)
        )
        try:
            reply: PendingReply | TransportError = self._transport.send_node(replicas, call, timeout_s)
        except TransportError as error:
            reply = error
        except BaseException:
            for settle in settles:
                settle()
            raise
        return NodeFlight(node_part=node_part, version=version, replicas=replicas, reply=reply, settles=settles)

    def receive_node(self, flight: NodeFlight, timeout_s: float) -> torch.Tensor:
        """Wait for the sum over a node's parts, rows as `node_part.tokens_T`. Raises TransportError, RequestError.

        A failure says nothing about which of the node's replicas failed: send the parts one by one to learn it.
        """
        assert flight.reply is not None, "sent as one message"
        try:
            if isinstance(flight.reply, TransportError):
                raise flight.reply
            partial_TH = flight.reply.result(timeout_s)
        finally:
            for settle in flight.settles:
                settle()
        self._counters.received(partial_TH.nbytes)
        return partial_TH

    def send_each(
        self,
        view: TableView,
        parts: Sequence[GroupPart],
        version: int,
        hidden_TH: torch.Tensor,
        timeout_s: float | None,
    ) -> tuple[Flight, ...]:
        """Start the calls of parts planned with table `version`; never raises TransportError, `receive` does."""
        chosen = [(part, self._replicas.choose(view, part.group)) for part in parts]
        return self._fly_each(version, chosen, hidden_TH, timeout_s)

    def _fly_each(
        self,
        version: int,
        chosen: Sequence[tuple[GroupPart, GroupReplica | None]],
        hidden_TH: torch.Tensor,
        timeout_s: float | None,
    ) -> tuple[Flight, ...]:
        flights: list[Flight] = []
        try:
            for part, replica in chosen:
                call = part.call(hidden_TH)
                send = partial(self._transport.send, call=call, timeout_s=timeout_s)
                flights.append(self.start(version, part, replica, len(call.hidden_TH), call.hidden_TH.nbytes, send))
        except BaseException:
            for flight in flights:
                flight.settle()
            raise
        return tuple(flights)

    def start(
        self,
        version: int,
        part: GroupPart,
        replica: GroupReplica | None,
        num_tokens: int,
        num_bytes: int,
        send: Callable[[GroupReplica], PendingReply],
    ) -> Flight:
        """Start the call of a part with `send`, which sends so many tokens' hidden states of so many bytes."""
        if replica is None:
            error = TransportError("it has no live replica in the placement table")
            return Flight(part=part, version=version, replica=None, reply=error, settle=_nothing)
        remote = self._node is not None and replica.node != self._node
        self._counters.call(len(part.token_rows_R), num_tokens, num_bytes, remote=remote)
        settle = self._replicas.sent(replica, len(part.token_rows_R))
        try:
            reply: PendingReply | TransportError = send(replica)
        except TransportError as error:
            reply = error
        except BaseException:
            settle()
            raise
        return Flight(part=part, version=version, replica=replica, reply=reply, settle=settle)

    def receive(self, flight: Flight, timeout_s: float) -> torch.Tensor:
        """Wait for partial_TH. Raises TransportError (the replica then counts as lost) or RequestError."""
        try:
            if isinstance(flight.reply, TransportError):
                raise flight.reply
            partial_TH = flight.reply.result(timeout_s)
        except TransportError as error:
            if flight.replica is not None and not isinstance(error, ReplyAbandoned):
                self._replicas.lost(flight.replica)
            raise
        finally:
            flight.settle()
        self._counters.received(partial_TH.nbytes)
        return partial_TH

    @staticmethod
    def cancel(flight: NodeFlight) -> None:
        """Nobody wants the answers any more; from any thread, and nothing happens to what was received."""
        for settle in (*flight.settles, *(each.settle for each in flight.flights)):
            settle()
        for reply in (flight.reply, *(each.reply for each in flight.flights)):
            if reply is not None and not isinstance(reply, TransportError):
                reply.cancel()


def _nothing() -> None:
    """Nothing was sent, so nothing is owed."""
