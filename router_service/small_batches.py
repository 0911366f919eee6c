"""Batches of a decode step on the CPU: one compiled function from hidden states to the groups' sockets, and one from
there to the sum.

Either is some hundred Python calls otherwise, which take longer than they look: between two layers a core's caches are
full of weights. What is not an ordinary batch is left to them, and what does not go its ordinary way is asked again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from experts.wire.lane import Lane
from router_service.counters import RouterCounters
from router_service.dispatch import SplitRows
from router_service.gating.compiled_gate import CompiledGate
from router_service.gating.gate import Gate
from router_service.pending import Pending
from router_service.replica_choice import ReplicaChoice
from router_service.slot_index import IntArray, SlotIndex
from router_service.table_view import TableBoard, TableView
from router_service.transport.grpc_stream import GrpcTransport

_Shape = tuple[int, int, int, int]
_NONE: IntArray = np.empty(0, np.int32)
# The messages of more are too long to be copied twice.
_MOST_TOKENS = 64
# What surrounds the numbers of a message is shorter.
_FRAME_BYTES = 128
# How long compiled code waits at a time, before it is asked whether that is still worth it.
_PATIENCE_S = 1.0
# A lane that could not be opened is tried again after so long.
_RETRY_S = 1.0
# Batches that may be out at a time: each takes a thread of every group.
_MOST_OUT = 8


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Layer:
    """A layer's gate and slots, and what compiled code wants to know of them."""

    gate: CompiledGate
    index: SlotIndex
    run: Callable[..., bool]

    @property
    def shape(self) -> _Shape:
        """What a desk's memory depends on: hidden size, experts a token, columns of logits, experts."""
        logits = self.gate.formula.logits
        return logits.panels.shape[1], self.gate.formula.top_k, logits.num_columns, self.index.num_experts

    @property
    def slots(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        index = self.index
        return index.slots_of_expert_EJ, index.num_slots_E, index.expert_of_slot_S, index.group_bounds_G1


class _Desk:
    """A lane to a table's groups, and memory for the batch that is on it: see `compile_ask_groups`."""

    def __init__(self, lane: Lane, view: TableView, here: _Layer) -> None:
        hidden_size, top_k, num_columns, _ = self.shape = here.shape
        rows = _MOST_TOKENS * top_k
        self.lane = lane
        self.view = view
        self.call_id = 0
        self.logits_TP = np.empty((_MOST_TOKENS, num_columns), np.float32)
        self.expert_ids_TK = np.empty((_MOST_TOKENS, top_k), np.int64)
        self.weights_TK = np.empty((_MOST_TOKENS, top_k), np.float32)
        self.split = SplitRows.of(here.index, rows)
        self.message = np.empty(_MOST_TOKENS * hidden_size * 4 + 16 * rows + _FRAME_BYTES, np.uint8)
        self.values = np.empty(_MOST_TOKENS * hidden_size, np.float32)
        self.progress = np.zeros(2, np.int64)


class SmallBatches:
    """Thread-safe: each batch that is out has a desk of its own.

    node: the node that the router runs on, None where no groups share messages
    again: plans and sends a batch of a layer, chosen experts and weights in the ordinary way
    reply_timeout_s: longest wait for the groups' answers
    """

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
        self._layers: dict[int, tuple[TableView, _Layer | None]] = {}
        self._lock = threading.Lock()
        self._view: TableView | None = None
        self._free: dict[_Shape, list[_Desk]] = {}
        self._num_out = 0
        self._try_again_at = 0.0
        compiled_add_answers()  # now, rather than in the first request
        for gate in gates.values():
            if isinstance(gate, CompiledGate):
                _compiled(gate)

    def send(self, view: TableView, layer: int, hidden_TH: torch.Tensor) -> SmallBatch | None:
        """Gate a batch and ask its groups; None for a batch that is not small, or whose groups are not all here."""
        known, here = self._layers.get(layer, (None, None))
        if known is not view:
            _, here = self._layers[layer] = view, self._prepare(view, layer)
        if (
            here is None
            or not 0 < len(hidden_TH) <= _MOST_TOKENS
            or not here.gate.takes(hidden_TH)
            or not self._transport.sends_inline(hidden_TH.nbytes)
            or self._replicas.unreachable(view)
            or (desk := self._desk(view, here)) is None
        ):
            return None
        desk.call_id += 1
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

    def leave(self, desk: _Desk, *, usable: bool) -> None:
        """A batch is over. usable: nothing is owed on its desk's lane any more"""
        with self._lock:
            self._num_out -= 1
            usable = usable and desk.view is self._view
            if usable:
                self._free.setdefault(desk.shape, []).append(desk)
        if not usable:
            desk.lane.close()

    def close(self) -> None:
        """Drop every lane; those that a batch is on when it is over."""
        self._use(None)

    def _desk(self, view: TableView, here: _Layer) -> _Desk | None:
        if self._view is not view:
            self._use(view)
        with self._lock:
            if self._num_out >= _MOST_OUT:
                return None
            if free := self._free.get(here.shape):
                self._num_out += 1
                return free.pop()
        if time.monotonic() < self._try_again_at:
            return None
        lane = self._transport.lane([replica for (replica,) in view.replicas])
        if lane is None:
            self._try_again_at = time.monotonic() + _RETRY_S
            return None
        with self._lock:
            self._num_out += 1
        return _Desk(lane, view, here)

    def _use(self, view: TableView | None) -> None:
        with self._lock:
            old, self._free, self._view = self._free, {}, view
        for desks in old.values():
            for desk in desks:
                desk.lane.close()

    def _prepare(self, view: TableView, layer: int) -> _Layer | None:
        gate = self._gates.get(layer)
        alone = all(len(each) == 1 and self._node in (None, each[0].node) for each in view.replicas)
        if not isinstance(gate, CompiledGate) or not alone:
            return None
        index = view.slots(layer, frozenset())
        if index.num_experts < gate.formula.logits.num_outputs:
            return None
        return _Layer(gate=gate, index=index, run=_compiled(gate))


class SmallBatch:
    """A batch whose experts are at work, see `Pending`."""

    def __init__(
        self, batches: SmallBatches, desk: _Desk, layer: int, hidden_TH: torch.Tensor, dispatched: float
    ) -> None:
        """dispatched: when it began, on the monotonic clock"""
        self._batches = batches
        self._desk: _Desk | None = desk
        self._layer = layer
        self._hidden_TH = hidden_TH
        self._dispatched = dispatched

    def result(self) -> torch.Tensor:
        """combined_TH, float32; the same sum, to the bit, and the same errors as `Pending.result`."""
        # Loads LLVM, which a GPU's process does not need.
        from experts.wire._numba.add_answers import LATE, SUMMED

        desk, self._desk = self._desk, None
        assert desk is not None, "a result is taken once"
        batches, (num_tokens, hidden_size) = self._batches, self._hidden_TH.shape
        out_TH = np.empty((num_tokens, hidden_size), np.float32)
        desk.progress[:] = 0
        ended = LATE
        while ended == LATE and not self._is_hopeless(desk.view):
            ended = compiled_add_answers()(
                *(desk.lane.sockets_G, desk.call_id, desk.split.shares_G3, desk.split.tokens_R, desk.progress),
                *(int(1e3 * _PATIENCE_S), desk.message, desk.values, out_TH),
            )
        whole = ended == SUMMED
        if whole:
            split, began = desk.split, self._dispatched
            batches.counters.small_batch(
                self._layer, split.rows_E, split.shares_G3.tolist(), num_tokens, hidden_size, began
            )
        batches.leave(desk, usable=whole)
        if whole:
            return torch.from_numpy(out_TH)
        chosen = torch.from_numpy(desk.expert_ids_TK[:num_tokens]), torch.from_numpy(desk.weights_TK[:num_tokens])
        return batches.again(self._layer, self._hidden_TH, *chosen).result()

    def cancel(self) -> None:
        """Nobody wants the result any more."""
        desk, self._desk = self._desk, None
        if desk is not None:
            self._batches.leave(desk, usable=False)

    __del__ = cancel

    def _is_hopeless(self, view: TableView) -> bool:
        """Whether there is another table, or it has taken too long: the ordinary way knows what to do then."""
        too_long = time.monotonic() - self._dispatched > self._batches.reply_timeout_s
        return too_long or self._batches.board.view is not view


def _compiled(gate: CompiledGate) -> Callable[..., bool]:
    # Loads LLVM, which a GPU's process does not need.
    from router_service._numba.ask_groups import compile_ask_groups

    return compile_ask_groups(*gate.formula.kind)


@cache
def compiled_add_answers() -> Callable[..., int]:
    """What adds the groups' answers; the first call compiles it."""
    # Loads LLVM, which a GPU's process does not need.
    from experts.wire._numba.add_answers import compile_add_answers

    return compile_add_answers()
