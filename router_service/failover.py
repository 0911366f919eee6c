"""What happens to a part whose replica failed: elsewhere, later, without it, or not at all."""

from __future__ import annotations

import time
from typing import Literal

import torch

from experts.errors import ExpertNotResident, GroupUnavailable
from router_service.caller import Caller
from router_service.counters import RouterCounters
from router_service.dispatch import GroupPart, plan_rows
from router_service.flight import Flight, NodeFlight
from router_service.replica_choice import RETRY_S, ReplicaChoice
from router_service.sender import Sender
from router_service.table_view import TableBoard, TableView
from router_service.transport.base import ReplyAbandoned, TransportError

OnExpertLoss = Literal["failover", "reload", "degrade", "fail"]


class Failover:
    """Finishes failed parts so that the sum is what it would have been.

    on_expert_loss:
      failover  groups that hold the same experts take over; what nobody holds waits for a table that mends it
      reload    waits for the group itself to come back
      degrade   as failover, but what nobody holds contributes nothing, and is counted
      fail      GroupUnavailable at once
    recovery_timeout_s: bound of all waiting, from the moment of the first failure; of a group that hangs that is when
                        it has given no answer for so long
    """

    def __init__(
        self,
        board: TableBoard,
        replicas: ReplicaChoice,
        sender: Sender,
        counters: RouterCounters,
        *,
        recovery_timeout_s: float,
        on_expert_loss: OnExpertLoss,
    ) -> None:
        self._board = board
        self._replicas = replicas
        self._sender = sender
        self._counters = counters
        self._timeout_s = recovery_timeout_s
        self._mode = on_expert_loss

    def send_each(self, flight: NodeFlight, hidden_TH: torch.Tensor, caller: Caller) -> tuple[Flight, ...]:
        """Send a node's parts one by one, its shared message having failed; whoever is lost then shows."""
        view = self._board.view
        assert view is not None, "a part was planned, so there was a table"
        assert flight.node_part is not None
        with self._counters.lock:
            self._counters.failovers += 1
        return self._sender.send_each(view, flight.node_part.parts, flight.version, hidden_TH, caller)

    def recover(
        self,
        flight: Flight,
        failure: TransportError | ExpertNotResident,
        hidden_TH: torch.Tensor,
        caller: Caller,
    ) -> list[tuple[GroupPart, torch.Tensor]]:
        """Bring home what `flight` did not: (part, partial_TH) ascending by group.

        hidden_TH: the whole batch. Raises GroupUnavailable naming the group that stayed away, ReplyAbandoned where
        nobody waits any more.
        """
        if self._mode == "fail":
            raise self._unavailable(flight, failure) from failure
        deadline = time.monotonic() + self._timeout_s
        with self._counters.lock:
            self._counters.failovers += 1
        stale = {flight.part.group: flight.version} if isinstance(failure, ExpertNotResident) else {}
        todo = [flight.part]
        done: list[tuple[GroupPart, torch.Tensor]] = []
        while todo:
            view = self._board.view
            assert view is not None, "a part was planned, so there was a table"
            avoid = self._replicas.unreachable(view) | {
                group for group, version in stale.items() if version >= view.table.version
            }
            pieces = [piece for part in todo for piece in self._pieces(view, part, avoid, len(hidden_TH))]
            reachable = [piece for piece in pieces if piece.group not in avoid]
            flights = self._sender.send_each(view, reachable, view.table.version, hidden_TH, caller)
            todo = [piece for piece in pieces if piece.group in avoid]
            for sent in flights:
                try:
                    left_s = max(0.0, deadline - time.monotonic())
                    done.append((sent.part, self._sender.receive(sent, caller, left_s)))
                except ReplyAbandoned:
                    raise
                except (TransportError, ExpertNotResident) as error:
                    if isinstance(error, ExpertNotResident):
                        stale[sent.part.group] = sent.version
                    flight, failure = sent, error
                    todo.append(sent.part)
            if flights or not todo:
                continue
            if self._mode == "degrade":
                self._count_degraded(todo, len(hidden_TH))
                break
            if reason := caller.why_gone():
                words = f"expert group {flight.part.group}: {failure}; nothing replaced it, and {reason}"
                raise ReplyAbandoned(words) from failure
            now = time.monotonic()
            if now >= deadline:
                raise self._unavailable(flight, failure) from failure
            # No longer than until somebody has to see that nobody waits any more.
            self._board.wait_other(view, min(min(deadline, caller.until) - now, RETRY_S))
        done.sort(key=lambda answered: answered[0].group)
        return done

    def _pieces(
        self, view: TableView, part: GroupPart, avoid: frozenset[int], num_tokens: int
    ) -> tuple[GroupPart, ...]:
        if self._mode == "reload":
            return (part,)
        if part.group not in avoid and self._still_holds(view, part):
            return (part,)
        return plan_rows(view.slots(part.layer, avoid), part.layer, num_tokens, *part.rows())

    @staticmethod
    def _still_holds(view: TableView, part: GroupPart) -> bool:
        holders = view.table.holders[part.layer]
        return all(part.group in holders[expert] for expert in part.expert_ids_S)

    def _count_degraded(self, parts: list[GroupPart], num_tokens: int) -> None:
        lost: set[int] = set()
        for part in parts:
            lost.update(range(num_tokens) if part.tokens_T is None else part.tokens_T.tolist())
        with self._counters.lock:
            self._counters.degraded_tokens += len(lost)

    def _unavailable(self, flight: Flight, failure: Exception) -> GroupUnavailable:
        group, replica = flight.part.group, flight.replica
        where = f" ({replica.replica} at {replica.address or replica.actor} on {replica.node})" if replica else ""
        if self._mode == "fail":
            outcome = "on_expert_loss is fail"
        else:
            outcome = f"nothing replaced it within router.recovery_timeout_s ({self._timeout_s:g} s)"
        return GroupUnavailable(f"expert group {group}{where}: {failure}; {outcome}", group)
