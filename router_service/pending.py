"""A batch whose experts are at work."""

from __future__ import annotations

import time

import torch

from experts.errors import ExpertNotResident
from router_service.caller import Caller
from router_service.combine import Combiner
from router_service.counters import RouterCounters
from router_service.failover import Failover
from router_service.flight import Flight, NodeFlight
from router_service.sender import Sender
from router_service.slot_index import IntArray
from router_service.transport.base import ReplyAbandoned, TransportError


class Pending:
    """Take the result once, or cancel, from any thread; keep `hidden_TH` unchanged until then."""

    def __init__(
        self,
        flights: list[NodeFlight],
        hidden_TH: torch.Tensor,
        sender: Sender,
        failover: Failover,
        counters: RouterCounters,
        caller: Caller,
        *,
        dispatched: float,
        reply_timeout_s: float,
    ) -> None:
        """dispatched: when it began, on the monotonic clock; reply_timeout_s: longest wait for one reply"""
        self._flights = flights
        self._hidden_TH = hidden_TH
        self._sender = sender
        self._failover = failover
        self._counters = counters
        self._dispatched = dispatched
        self._reply_timeout_s = reply_timeout_s
        self._caller = caller

    def result(self) -> torch.Tensor:
        """combined_TH, in hidden's dtype, on its device.

        The sum is float32: over a node's groups in ascending order, then over the nodes in the order of their
        first group, wherever the additions are done. Raises GroupUnavailable where a group stayed away past the
        recovery timeout, RequestError where a group refused the call, TimeoutError where the caller's time limit
        passed or it cancelled.
        """
        try:
            combined_TH = self._result()
        except BaseException as error:
            self.cancel()  # what the others still owe
            if isinstance(error, ReplyAbandoned):
                raise TimeoutError(str(error)) from error
            raise
        self._counters.combined(time.monotonic() - self._dispatched)
        return combined_TH

    def _result(self) -> torch.Tensor:
        if len(self._flights) == 1 and not self._flights[0].reply:
            # One node: its sum is the whole.
            return self._sum_of(self._flights[0].flights).result(self._hidden_TH.dtype)
        combiner = self._combiner()
        for flight in self._flights:
            combiner.add(*self._collect(flight))
        return combiner.result(self._hidden_TH.dtype)

    def cancel(self) -> None:
        """Nobody wants the result any more: tell the groups, where the transport can."""
        self._caller.cancel()

    def _collect(self, flight: NodeFlight) -> tuple[IntArray | None, torch.Tensor]:
        """The batch's tokens and one node's sum for them."""
        flights = flight.flights
        if flight.reply is not None:
            assert flight.node_part is not None
            try:
                return flight.node_part.tokens_T, self._sender.receive_node(flight, self._caller, self._reply_timeout_s)
            except ReplyAbandoned:
                raise
            except (TransportError, ExpertNotResident):
                flights = self._failover.send_each(flight, self._hidden_TH, self._caller)
        if len(flights) == 1:
            (alone,) = flights
            try:
                return alone.part.tokens_T, self._receive(alone)
            except (TransportError, ExpertNotResident) as failure:
                combiner = self._combiner()
                self._recover(alone, failure, combiner)
                return None, combiner.result(torch.float32)
        return None, self._sum_of(flights).result(torch.float32)

    def _sum_of(self, flights: tuple[Flight, ...]) -> Combiner:
        combiner = self._combiner()
        for flight in flights:
            try:
                combiner.add(flight.part.tokens_T, self._receive(flight))
            except (TransportError, ExpertNotResident) as failure:
                self._recover(flight, failure, combiner)
        return combiner

    def _receive(self, flight: Flight) -> torch.Tensor:
        return self._sender.receive(flight, self._caller, self._reply_timeout_s)

    def _recover(self, flight: Flight, failure: TransportError | ExpertNotResident, combiner: Combiner) -> None:
        if isinstance(failure, ReplyAbandoned):
            raise failure
        for part, partial_TH in self._failover.recover(flight, failure, self._hidden_TH, self._caller):
            combiner.add(part.tokens_T, partial_TH)

    def _combiner(self) -> Combiner:
        num_tokens, hidden_size = self._hidden_TH.shape
        return Combiner(num_tokens, hidden_size, self._hidden_TH.device)
