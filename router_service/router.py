"""The router: hidden states in, experts' weighted sum out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch

from experts.errors import GroupUnavailable, RequestError
from router_service.caller import Caller
from router_service.combine import compiled_add_rows
from router_service.counters import RouterCounters
from router_service.dispatch import compiled_split_rows, plan_dispatch
from router_service.failover import Failover, OnExpertLoss
from router_service.gating.gate import ChoiceLimit, Gate
from router_service.lane_run import LaneRun
from router_service.node_limit import NodeLimit
from router_service.pending import Pending
from router_service.placement import PlacementTable
from router_service.replica_choice import ReplicaChoice
from router_service.sender import Sender
from router_service.small_batch import SmallBatch
from router_service.small_batches import SmallBatches
from router_service.table_view import TableBoard, TableView
from router_service.transport.base import Transport
from router_service.transport.grpc_stream import GrpcTransport

NodeLimitMode = Literal["exact", "restrict"]


class Router:
    """Routes batches of any layer over a transport. Thread-safe; a Pending belongs to one thread.

    gates:              layer -> gate, for `route`; may be empty where only `dispatch` is used
    recovery_timeout_s: longest wait for a lost group, and for any one reply
    on_expert_loss:     see `router_service.failover.Failover`
    node:               the node that this process runs on, as placement tables name it; the groups of any other
                        node then share one message and answer with one sum. None: every group is called by itself
    max_nodes_per_token: limit the nodes that a token's experts are on; None: no limit
    node_limit_mode:    "exact" chooses among the replicas of each expert so that a token touches as few nodes as can
                        be, more than the limit where its experts are nowhere else; outputs are those without limit.
                        "restrict" also lets a token use only experts on its best nodes, as DeepSeek-V2 does with
                        devices (`NodeLimit`; on further nodes where these hold too few): outputs change; `dispatch`,
                        whose caller chose, is not restricted
    """

    def __init__(
        self,
        transport: Transport,
        gates: Mapping[int, Gate],
        *,
        recovery_timeout_s: float,
        on_expert_loss: OnExpertLoss = "failover",
        node: str | None = None,
        max_nodes_per_token: int | None = None,
        node_limit_mode: NodeLimitMode = "exact",
    ) -> None:
        compiled_split_rows(), compiled_add_rows()  # now, rather than in the first request
        self.counters = RouterCounters()
        self._transport = transport
        self._gates = gates
        self._timeout_s = recovery_timeout_s
        self._node = node
        self._max_nodes_per_token = max_nodes_per_token
        self._restrict = node_limit_mode == "restrict"
        self._board = TableBoard()
        self.replicas = ReplicaChoice()
        self._sender = Sender(transport, self.replicas, self.counters, node)
        self._small: SmallBatches | None = None
        if isinstance(transport, GrpcTransport) and max_nodes_per_token is None:
            self._small = SmallBatches(
                *(transport, gates, self._board, self.replicas, self.counters, node),
                again=partial(self._dispatch, timeout_s=None),
                reply_timeout_s=recovery_timeout_s,
            )
        self._failover = Failover(
            self._board,
            self.replicas,
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

    @property
    def has_lanes(self) -> bool:
        """Whether small batches may go to groups of this machine over sockets of their own."""
        return self._small is not None

    def wait_table(self, seen: PlacementTable | None, timeout_s: float) -> PlacementTable | None:
        """The current table as soon as it is not `seen`, or whatever it is after `timeout_s`."""
        view = self._board.view
        if (view.table if view is not None else None) is seen:
            self._board.wait_other(view, timeout_s)
        return self.table

    def update(self, table: PlacementTable) -> None:
        """Use `table` from now on and wake every batch that waits for one; from any thread.

        Versions must grow: an older table than the current one is ignored. Calls out to replicas that are no
        longer listed fail over at once.
        """
        departed = self._board.publish(table)
        self.replicas.forget(departed)
        for replica in departed:
            self._transport.forget(replica)

    def route(self, layer: int, hidden_TH: torch.Tensor, *, timeout_s: float | None = None) -> Pending | SmallBatch:
        """Gate `hidden_TH` and send its tokens to their experts.

        timeout_s: bound of the whole call, the experts' work included. Raises RequestError for a layer without a
        gate, GroupUnavailable where no table came in time.
        """
        gate = self._gates.get(layer)
        if gate is None:
            known = ", ".join(map(str, sorted(self._gates))) or "none"
            raise RequestError(f"layer: {layer} has no gate here; layers with a gate: {known}", "layer")
        _check_hidden(hidden_TH)
        if self._small is not None and timeout_s is None:
            batch = self._small.send(self._view(), layer, hidden_TH)
            if batch is not None:
                return batch
        limit: ChoiceLimit | None = None
        if self._restrict and self._max_nodes_per_token is not None:
            limit = NodeLimit(self._view().held_by_nodes(layer), self._max_nodes_per_token)
        expert_ids_TK, weights_TK = gate(hidden_TH, limit)
        return self._dispatch(layer, hidden_TH, expert_ids_TK, weights_TK, timeout_s)

    def run(self, layers: tuple[int, ...], hidden_TH: torch.Tensor) -> LaneRun | None:
        """A lane on which compiled code takes a batch of `hidden_TH`'s size through `layers`, as `route` would one by
        one; None where it cannot, at present or at all."""
        view = self._board.view
        return self._small.run(view, layers, hidden_TH) if self._small is not None and view is not None else None

    def dispatch(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        *,
        timeout_s: float | None = None,
    ) -> Pending:
        """Send tokens to the experts that the caller chose.

        expert_ids_TK: integer, -1 for no expert; weights_TK: float; timeout_s: as in `route`. Raises RequestError
        naming the argument, GroupUnavailable where no table came in time.
        """
        _check_hidden(hidden_TH)
        if (
            expert_ids_TK.dim() != 2
            or expert_ids_TK.shape[0] != hidden_TH.shape[0]
            or expert_ids_TK.dtype not in (torch.int64, torch.int32)
        ):
            raise RequestError(
                f"expert_ids: {expert_ids_TK.dtype} of shape {tuple(expert_ids_TK.shape)}, expected int64 or int32 "
                f"[{hidden_TH.shape[0]}, K]",
                "expert_ids",
            )
        if weights_TK.shape != expert_ids_TK.shape:
            raise RequestError(
                f"weights: shape {tuple(weights_TK.shape)}, expected expert_ids' {tuple(expert_ids_TK.shape)}",
                "weights",
            )
        num_experts = self._view().slots(layer, frozenset()).num_experts
        if expert_ids_TK.numel():
            low, high = (int(bound) for bound in torch.aminmax(expert_ids_TK))
            if low < -1 or high >= num_experts:
                wrong = low if low < -1 else high
                raise RequestError(
                    f"expert_ids: there is no {wrong}; layer {layer} has experts 0 to {num_experts - 1}, -1 is none",
                    "expert_ids",
                )
        return self._dispatch(layer, hidden_TH, expert_ids_TK, weights_TK.float(), timeout_s)

    def close(self) -> None:
        """Drop every connection."""
        if self._small is not None:
            self._small.close()
        self._transport.close()

    def _dispatch(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        timeout_s: float | None,
    ) -> Pending:
        dispatched = time.monotonic()
        caller = Caller(timeout_s)
        hidden_TH = hidden_TH.detach()
        view = self._view()
        avoid = self.replicas.unreachable(view)
        cover = view.cover(layer, avoid, self._node) if self._max_nodes_per_token is not None else None
        plan = plan_dispatch(view.slots(layer, avoid), layer, expert_ids_TK, weights_TK, cover)
        self.counters.batch(layer, plan.num_tokens, plan.tokens_per_expert_E)
        return Pending(
            self._sender.send_all(view, plan.parts, hidden_TH, caller),
            hidden_TH,
            self._sender,
            self._failover,
            self.counters,
            caller,
            dispatched=dispatched,
            reply_timeout_s=self._timeout_s,
        )

    def _view(self) -> TableView:
        """The current view, waiting for the first one."""
        view = self._board.view
        if view is None:
            self._board.wait_other(None, self._timeout_s)
            view = self._board.view
            if view is None:
                raise GroupUnavailable(
                    f"no expert group has been announced within router.recovery_timeout_s ({self._timeout_s:g} s)",
                    0,
                )
        return view


def _check_hidden(hidden_TH: torch.Tensor) -> None:
    if hidden_TH.dim() != 2 or not hidden_TH.is_floating_point():
        raise RequestError(
            f"hidden: {hidden_TH.dtype} of shape {tuple(hidden_TH.shape)}, expected float [T, H]", "hidden"
        )
