"""Sending the parts of a plan to replicas of their groups, and receiving what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from router_service.caller import Caller
from router_service.counters import RouterCounters
from router_service.dispatch import GroupPart
from router_service.flight import Flight, NodeFlight
from router_service.node_part import bundle, num_distinct_tokens
from router_service.placement import GroupReplica
from router_service.replica_choice import ReplicaChoice
from router_service.table_view import TableView
from router_service.transport.base import PendingReply, ReplyAbandoned, Transport, TransportError


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
        caller: Caller,
    ) -> list[NodeFlight]:
        """Start all calls of a batch, nodes in the order of their first group."""
        by_node: dict[str, list[tuple[GroupPart, GroupReplica | None]]] = {}
        for part in parts:
            replica = self._replicas.choose(view, part.group)
            # A group that is lost is added where it was: its sum is waited for, and outputs do not change.
            node = replica.node if replica is not None else view.nodes[part.group]
            by_node.setdefault(node, []).append((part, replica))
        try:
            return [
                caller.sent(self._send_node(view, node, chosen, hidden_TH, caller)) for node, chosen in by_node.items()
            ]
        except BaseException:
            caller.cancel()
            raise

    def _send_node(
        self,
        view: TableView,
        node: str,
        chosen: list[tuple[GroupPart, GroupReplica | None]],
        hidden_TH: torch.Tensor,
        caller: Caller,
    ) -> NodeFlight:
        version = view.table.version
        parts = [part for part, _ in chosen]
        replicas = tuple(replica for _, replica in chosen if replica is not None)
        if self._node in (None, node) or len(replicas) < 2 or len(replicas) < len(chosen):
            self._counters.node(num_distinct_tokens(parts, len(hidden_TH)))
            return NodeFlight(version=version, flights=self._fly_each(version, chosen, hidden_TH, caller))
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
            reply: PendingReply | TransportError = self._transport.send_node(replicas, call, caller.left_s())
        except TransportError as error:
            reply = error
        except BaseException:
            for settle in settles:
                settle()
            raise
        return NodeFlight(node_part=node_part, version=version, replicas=replicas, reply=reply, settles=settles)

    def receive_node(self, flight: NodeFlight, caller: Caller, patience_s: float) -> torch.Tensor:
        """Wait for the sum over a node's parts, rows as `node_part.tokens_T`. Raises as `receive` does.

        A failure says nothing about which of the node's replicas failed: send the parts one by one to learn it.
        """
        assert flight.reply is not None, "sent as one message"
        try:
            partial_TH = _take(flight.reply, caller, patience_s)
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
        caller: Caller,
    ) -> tuple[Flight, ...]:
        """Start the calls of parts planned with table `version`; never raises TransportError, `receive` does."""
        chosen = [(part, self._replicas.choose(view, part.group)) for part in parts]
        flights = self._fly_each(version, chosen, hidden_TH, caller)
        return caller.sent(NodeFlight(version=version, flights=flights)).flights

    def _fly_each(
        self,
        version: int,
        chosen: Sequence[tuple[GroupPart, GroupReplica | None]],
        hidden_TH: torch.Tensor,
        caller: Caller,
    ) -> tuple[Flight, ...]:
        flights: list[Flight] = []
        try:
            for part, replica in chosen:
                call = part.call(hidden_TH)
                send = partial(self._transport.send, call=call, timeout_s=caller.left_s())
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

    def receive(self, flight: Flight, caller: Caller, patience_s: float) -> torch.Tensor:
        """Wait for partial_TH.

        Raises TransportError, where the replica counts as lost from then on, ReplyAbandoned where nobody waits any
        more, RequestError.
        """
        try:
            partial_TH = _take(flight.reply, caller, patience_s)
        except TransportError as error:
            if flight.replica is not None and not isinstance(error, ReplyAbandoned):
                self._replicas.lost(flight.replica, str(error))
            raise
        finally:
            flight.settle()
        self._counters.received(partial_TH.nbytes)
        return partial_TH


def _take(reply: PendingReply | TransportError, caller: Caller, patience_s: float) -> torch.Tensor:
    try:
        if isinstance(reply, TransportError):
            raise reply
        left_s = caller.left_s()
        return reply.result(patience_s if left_s is None else min(patience_s, left_s))
    except ReplyAbandoned:
        raise
    except TransportError as error:
        if reason := caller.why_gone():
            raise ReplyAbandoned(f"{error}; {reason}") from error
        raise


def _nothing() -> None:
    """Nothing was sent, so nothing is owed."""
