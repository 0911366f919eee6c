"""The router: hidden states in, experts' weighted sum out."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from experts.errors import ExpertNotResident, GroupUnavailable, RequestError
from router_service.combine import Combiner
from router_service.counters import RouterCounters
from router_service.dispatch import plan_dispatch
from router_service.failover import Failover, OnExpertLoss
from router_service.gating.gate import Gate
from router_service.placement import PlacementTable
from router_service.replica_choice import ReplicaChoice
from router_service.sender import Flight, Sender
from router_service.table_view import TableBoard, TableView
from router_service.transport.base import Transport, TransportError


class Pending:
    """A batch whose experts are at work. Take the result once; keep `hidden_TH` unchanged until then."""

    def __init__(
        self, flights: list[Flight], hidden_TH: torch.Tensor, sender: Sender, failover: Failover
    ) -> None:
        self._flights = flights
        self._hidden_TH = hidden_TH
        self._sender = sender
        self._failover = failover

    def result(self) -> torch.Tensor:
        """combined_TH, in hidden's dtype, on its device; the sum is float32, over groups in ascending order.

        Raises GroupUnavailable where a group stayed away past the recovery timeout, RequestError where a
        group refused the call.
        """
        hidden_TH = self._hidden_TH
        combiner = Combiner(hidden_TH.shape[0], hidden_TH.shape[1], hidden_TH.device)
        for flight in self._flights:
            try:
                combiner.add(flight.part.tokens_T, self._sender.receive(flight))
            except (TransportError, ExpertNotResident) as failure:
                for part, partial_TH in self._failover.recover(flight, failure, hidden_TH):
                    combiner.add(part.tokens_T, partial_TH)
        return combiner.result(hidden_TH.dtype)


class Router:
    """Routes batches of any layer over a transport. Thread-safe; a Pending belongs to one thread.

    gates:              layer -> gate, for `route`; may be empty where only `dispatch` is used
    recovery_timeout_s: longest wait for a lost group, and for any one reply
    on_expert_loss:     see `router_service.failover.Failover`
    """

    def __init__(
        self,
        transport: Transport,
        gates: Mapping[int, Gate],
        *,
        recovery_timeout_s: float,
        on_expert_loss: OnExpertLoss = "failover",
    ) -> None:
        self.counters = RouterCounters()
        self._transport = transport
        self._gates = gates
        self._timeout_s = recovery_timeout_s
        self._board = TableBoard()
        self._replicas = ReplicaChoice()
        self._sender = Sender(transport, self._replicas, self.counters, recovery_timeout_s)
        self._failover = Failover(
            self._board,
            self._replicas,
            self._sender,
            self.counters,
            recovery_timeout_s=recovery_timeout_s,
            on_expert_loss=on_expert_loss,
        )

    @property
    def table(self) -> PlacementTable | None:
        """The current placement table; None before the first `update`."""
        view = self._board.view
        return view.table if view is not None else None

    def update(self, table: PlacementTable) -> None:
        """Use `table` from now on and wake every batch that waits for one; from any thread.

        Versions must grow: an older table than the current one is ignored. Calls out to replicas that are no
        longer listed fail over at once.
        """
        departed = self._board.publish(table)
        self._replicas.forget(departed)
        for replica in departed:
            self._transport.forget(replica)

    def route(self, layer: int, hidden_TH: torch.Tensor) -> Pending:
        """Gate `hidden_TH` and send its tokens to their experts.

        Raises RequestError for a layer without a gate, GroupUnavailable where no table came in time.
        """
        gate = self._gates.get(layer)
        if gate is None:
            known = ", ".join(map(str, sorted(self._gates))) or "none"
            raise RequestError(f"layer {layer} has no gate here; layers with a gate: {known}", "layer")
        _check_hidden(hidden_TH)
        return self._dispatch(layer, hidden_TH, *gate(hidden_TH))

    def dispatch(
        self, layer: int, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Pending:
        """Send tokens to the experts that the caller chose.

        expert_ids_TK: integer, -1 for no expert; weights_TK: float. Raises RequestError naming the argument,
        GroupUnavailable where no table came in time.
        """
        _check_hidden(hidden_TH)
        if (
            expert_ids_TK.dim() != 2
            or expert_ids_TK.shape[0] != hidden_TH.shape[0]
            or expert_ids_TK.dtype not in (torch.int64, torch.int32)
        ):
            raise RequestError(
                f"expert_ids is {expert_ids_TK.dtype} of shape {tuple(expert_ids_TK.shape)}, expected "
                "int64 or "
                f"int32 [{hidden_TH.shape[0]}, K]",
                "expert_ids",
            )
        if weights_TK.shape != expert_ids_TK.shape:
            raise RequestError(
                f"weights has shape {tuple(weights_TK.shape)}, expected expert_ids' "
                f"{tuple(expert_ids_TK.shape)}",
                "weights",
            )
        num_experts = self._view().slots(layer, frozenset()).num_experts
        if expert_ids_TK.numel():
            low, high = (int(bound) for bound in torch.aminmax(expert_ids_TK))
            if low < -1 or high >= num_experts:
                wrong = low if low < -1 else high
                raise RequestError(
                    f"expert_ids holds {wrong}; layer {layer} has experts 0 to {num_experts - 1}, -1 is none",
                    "expert_ids",
                )
        return self._dispatch(layer, hidden_TH, expert_ids_TK, weights_TK.float())

    def close(self) -> None:
        """Drop every connection."""
        self._transport.close()

    def _dispatch(
        self, layer: int, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Pending:
        hidden_TH = hidden_TH.detach()
        view = self._view()
        index = view.slots(layer, self._replicas.unreachable(view))
        plan = plan_dispatch(index, layer, expert_ids_TK, weights_TK)
        self.counters.batch(layer, plan.num_tokens, plan.tokens_per_expert_E)
        flights = [self._sender.send(view, part, hidden_TH) for part in plan.parts]
        return Pending(flights, hidden_TH, self._sender, self._failover)

    def _view(self) -> TableView:
        """The current view, waiting for the first one."""
        view = self._board.view
        if view is None:
            deadline = time.monotonic() + self._timeout_s
            self._board.wait_other(None, max(0.0, deadline - time.monotonic()))
            view = self._board.view
            if view is None:
                raise GroupUnavailable(
                    "no expert group has been announced within router.recovery_timeout_s "
                    f"({self._timeout_s:g} s)",
                    0,
                )
        return view


def _check_hidden(hidden_TH: torch.Tensor) -> None:
    if hidden_TH.dim() != 2 or not hidden_TH.is_floating_point():
        raise RequestError(
            f"hidden is {hidden_TH.dtype} of shape {tuple(hidden_TH.shape)}, expected float [T, H]", "hidden"
        )
