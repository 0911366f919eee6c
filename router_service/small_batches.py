"""Batches of a decode step on the CPU: one compiled function from hidden states to the groups' sockets, and one from
there to the sum.

Either is some hundred Python calls otherwise, which take longer than they look: between two layers a core's caches are
full of weights. What is not an ordinary batch is left to them, and what does not go its ordinary way is asked again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue

import numpy as np
import numpy.typing as npt
import torch

from router_service.counters import RouterCounters
from router_service.desk import MOST_TOKENS, Desk, LayerBatches, Shape
from router_service.gating.compiled_gate import CompiledGate
from router_service.gating.gate import Gate
from router_service.lane_run import LaneRun, LayerStack
from router_service.pending import Pending
from router_service.replica_choice import ReplicaChoice
from router_service.slot_index import IntArray
from router_service.small_batch import SmallBatch, compiled_add_answers
from router_service.table_view import TableBoard, TableView
from router_service.transport.grpc_stream import GrpcTransport

_NONE: IntArray = np.empty(0, np.int32)
# A lane that could not be opened is tried again after so long.
_RETRY_S = 1.0
# Batches that may be out at a time: each takes a thread of every group.
_MOST_OUT = 8


class SmallBatches:
    """Thread-safe: each batch that is out has a desk of its own.

    node: the node that the router runs on, None where no groups share messages
    again: plans and sends a batch of a layer, chosen experts and weights in the ordinary way
    reply_timeout_s: longest wait for the groups' answers
    patience_s: how long compiled code waits at a time, before it is asked whether that is still worth it
    """

    patience_s = 1.0

    def __init__(
        self,
        transport: GrpcTransport,
        gates: Mapping[int, Gate],
        board: TableBoard,
        replicas: ReplicaChoice,
        counters: RouterCounters,
        node: str | None,
        *,
        again: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], Pending],
        reply_timeout_s: float,
    ) -> None:
        self.board = board
        self.counters = counters
        self.again = again
        self.reply_timeout_s = reply_timeout_s
        self._transport = transport
        self._gates = gates
        self._replicas = replicas
        self._node = node
        self._layers: dict[int, tuple[TableView, LayerBatches | None]] = {}
        self._stacks: dict[tuple[int, ...], tuple[TableView, LayerStack | None]] = {}
        self._lock = threading.Lock()
        self._view: TableView | None = None
        self._free: dict[Shape, list[Desk]] = {}
        # One for each batch that may go out. It takes them back from `__del__` too, at whatever place that comes.
        self._places: SimpleQueue[None] = SimpleQueue()
        for _ in range(_MOST_OUT):
            self._places.put(None)
        self._try_again_at = 0.0
        compiled_add_answers()  # now, rather than in the first request
        for gate in gates.values():
            if isinstance(gate, CompiledGate):
                _compiled(gate)

    def send(self, view: TableView, layer: int, hidden_TH: torch.Tensor) -> SmallBatch | None:
        """Gate a batch and ask its groups; None for a batch that is not small, or whose groups are not all here."""
        here = self._layer(view, layer)
        if here is None or (desk := self._desk_for(view, here, hidden_TH)) is None:
            return None
        desk.call_id += 1
        desk.progress[:] = 0
        began = time.monotonic()
        sent = here.run(
            *(hidden_TH.detach().contiguous().numpy(), *here.gate.constants),
            *(desk.logits_TP, desk.expert_ids_TK, desk.weights_TK, _NONE, *here.slots, *desk.split),
            *(desk.lane.sockets_G, desk.call_id, layer, desk.message),
        )
        if not sent:
            self.leave(desk, usable=False)
            return None
        return SmallBatch(self, desk, layer, hidden_TH, began)

    def run(self, view: TableView, layers: tuple[int, ...], hidden_TH: torch.Tensor) -> LaneRun | None:
        """A lane for a batch that goes through `layers` one after the other; None where one of them would not be sent,
        or they are not alike."""
        known, stack = self._stacks.get(layers, (None, None))
        if known is not view:
            prepared = [self._layer(view, layer) for layer in layers]
            whole = [each for each in prepared if each is not None]
            stack = LayerStack.of(layers, whole) if len(whole) == len(layers) else None
            self._stacks[layers] = view, stack
        if stack is None or (desk := self._desk_for(view, stack.first, hidden_TH)) is None:
            return None
        return LaneRun(desk, stack, self, patience_ms=int(1e3 * self.patience_s))

    def resume(
        self, desk: Desk, layer: int, hidden_TH: torch.Tensor, began: float, out_TH: npt.NDArray[np.float32]
    ) -> SmallBatch:
        """The rest of a run's batch, which began at `began` on the monotonic clock; `out_TH` is there of its sum."""
        return SmallBatch(self, desk, layer, hidden_TH, began, out_TH)

    def leave(self, desk: Desk, *, usable: bool) -> None:
        """A batch is over. usable: nothing is owed on its desk's lane any more"""
        self._places.put(None)
        if usable:
            with self._lock:
                usable = desk.view is self._view
                if usable:
                    self._free.setdefault(desk.shape, []).append(desk)
        if not usable:
            desk.lane.close()

    def lost(self, view: TableView, group: int) -> None:
        """A group gave no answer in time."""
        (replica,) = view.replicas[group]
        self._replicas.lost(replica, f"{replica.replica} gave no answer within {self.reply_timeout_s:g} s")

    def close(self) -> None:
        """Drop every lane; those that a batch is on when it is over."""
        self._use(None)

    def _layer(self, view: TableView, layer: int) -> LayerBatches | None:
        known, here = self._layers.get(layer, (None, None))
        if known is not view:
            _, here = self._layers[layer] = view, self._prepare(view, layer)
        return here

    def _desk_for(self, view: TableView, here: LayerBatches, hidden_TH: torch.Tensor) -> Desk | None:
        """None for a batch that is not small, whose groups are not all here, or while too many are out."""
        small = (
            0 < len(hidden_TH) <= MOST_TOKENS
            and here.gate.takes(hidden_TH)
            and self._transport.sends_inline(hidden_TH.nbytes)
            and not self._replicas.unreachable(view)
        )
        return self._desk(view, here) if small else None

    def _desk(self, view: TableView, here: LayerBatches) -> Desk | None:
        if self._view is not view:
            self._use(view)
        try:
            self._places.get_nowait()
        except Empty:
            return None
        desk = None
        try:
            desk = self._free_desk(view, here) or self._new_desk(view, here)
        finally:
            if desk is None:
                self._places.put(None)
        return desk

    def _free_desk(self, view: TableView, here: LayerBatches) -> Desk | None:
        with self._lock:
            free = self._free.get(here.shape) if self._view is view else None
            return free.pop() if free else None

    def _new_desk(self, view: TableView, here: LayerBatches) -> Desk | None:
        if time.monotonic() < self._try_again_at:
            return None
        lane = self._transport.lane([replica for (replica,) in view.replicas])
        if lane is None:
            self._try_again_at = time.monotonic() + _RETRY_S
            return None
        return Desk(lane, view, here)

    def _use(self, view: TableView | None) -> None:
        """Keep desks of `view` from now on, unless it is older than what they are of; None: of no view at all."""
        with self._lock:
            known = self._view
            if view is not None and known is not None and view.table.version < known.table.version:
                return
            old, self._free, self._view = self._free, {}, view
        for desks in old.values():
            for desk in desks:
                desk.lane.close()

    def _prepare(self, view: TableView, layer: int) -> LayerBatches | None:
        gate = self._gates.get(layer)
        alone = all(len(each) == 1 and self._node in (None, each[0].node) for each in view.replicas)
        if not isinstance(gate, CompiledGate) or not alone:
            return None
        index = view.slots(layer, frozenset())
        if index.num_experts < gate.formula.logits.num_outputs:
            return None
        return LayerBatches(gate=gate, index=index, run=_compiled(gate))


def _compiled(gate: CompiledGate) -> Callable[..., bool]:
    # Loads LLVM, which a GPU's process does not need.
    from router_service._numba.ask_groups import compile_ask_groups

    return compile_ask_groups(*gate.formula.kind)
