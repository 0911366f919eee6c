"""Batches of a decode step on the CPU, from hidden states to the groups' messages as one compiled function, and from
their answers to the sum as another.

Either is some forty Python calls otherwise, which take longer than they look: between two layers a core's caches are
full of weights. What is not an ordinary batch is left to them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from router_service.counters import RouterCounters
from router_service.dispatch import SplitRows
from router_service.gating.compiled_gate import CompiledGate
from router_service.gating.gate import Gate
from router_service.replica_choice import ReplicaChoice
from router_service.sender import Flight, NodeFlight, Sender
from router_service.slot_index import IntArray, SlotIndex
from router_service.table_view import TableView
from router_service.transport.grpc_stream import GrpcTransport

_NONE: IntArray = np.empty(0, np.int32)
# The messages of more are too long to be copied twice.
_MOST_TOKENS = 64
# What surrounds the numbers of a message is shorter.
_FRAME_BYTES = 128


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Layer:
    """A layer's gate and slots, and what compiled code wants to know of them."""

    gate: CompiledGate
    index: SlotIndex
    run: Callable[..., None]

    @property
    def slots(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        index = self.index
        return index.slots_of_expert_EJ, index.num_slots_E, index.expert_of_slot_S, index.group_bounds_G1


class _Work(threading.local):
    """A thread's memory for what nobody needs once the messages are out."""

    def __init__(self) -> None:
        self.logits_TP = np.empty((0, 0), np.float32)
        self.messages = np.empty(0, np.uint8)


class SmallBatches:
    """Thread-safe.

    node: the node that the router runs on, None where no groups share messages
    """

    def __init__(
        self,
        transport: GrpcTransport,
        gates: Mapping[int, Gate],
        sender: Sender,
        replicas: ReplicaChoice,
        counters: RouterCounters,
        node: str | None,
    ) -> None:
        self._transport = transport
        self._gates = gates
        self._sender = sender
        self._replicas = replicas
        self._counters = counters
        self._node = node
        self._layers: dict[int, tuple[TableView, _Layer | None]] = {}
        self._work = _Work()
        for gate in gates.values():
            if isinstance(gate, CompiledGate):
                _compiled(gate)  # now, rather than in the first request

    def send(self, view: TableView, layer: int, hidden_TH: torch.Tensor) -> list[NodeFlight] | None:
        """Gate a batch and start its calls; None for a batch that is not small, or whose groups are not all here."""
        known, here = self._layers.get(layer, (None, None))
        if known is not view:
            _, here = self._layers[layer] = view, self._prepare(view, layer)
        num_tokens = len(hidden_TH)
        if (
            here is None
            or not 0 < num_tokens <= _MOST_TOKENS
            or not here.gate.takes(hidden_TH)
            or not self._transport.takes_message(hidden_TH.nbytes)
            or self._replicas.unreachable(view)
        ):
            return None
        logits, top_k, num_groups = here.gate.formula.logits, here.gate.formula.top_k, len(view.replicas)
        num_rows = num_tokens * top_k
        copies, messages = min(num_groups, top_k), min(num_groups, num_rows)
        room = copies * hidden_TH.nbytes + messages * _FRAME_BYTES + 16 * num_rows + 4 * num_groups
        work = self._work
        if len(work.messages) < room:
            work.messages = np.empty(room, np.uint8)
        if work.logits_TP.shape[1] != logits.num_columns:
            work.logits_TP = np.empty((_MOST_TOKENS, logits.num_columns), np.float32)
        split = SplitRows.of(here.index, num_rows)
        call_ids, ends_G = self._transport.call_ids(num_groups), np.empty(num_groups, np.int64)
        here.run(
            *(hidden_TH.detach().contiguous().numpy(), *here.gate.constants, work.logits_TP),
            *(np.empty((num_tokens, top_k), np.int64), np.empty((num_tokens, top_k), np.float32)),
            *(_NONE, *here.slots, *split, call_ids, layer, work.messages, ends_G),
        )
        assert ends_G[-1] <= len(work.messages)  # compiled code looks at no bounds
        self._counters.batch(layer, num_tokens, split.rows_E)
        self._counters.node(num_tokens)
        flights, ids, ends, begin = [], call_ids.tolist(), ends_G.tolist(), 0
        for part in split.parts(layer):
            message, begin = work.messages[begin : ends[part.group]].data, ends[part.group]
            copies = num_tokens if part.tokens_T is None else len(part.tokens_T)
            send = partial(self._transport.send_message, call_id=ids[part.group], message=message)
            replica = self._replicas.choose(view, part.group)
            version, num_bytes = view.table.version, copies * hidden_TH.shape[1] * 4
            flights.append(self._sender.start(version, part, replica, copies, num_bytes, send))
        return [NodeFlight(version=view.table.version, flights=tuple(flights))]

    def sum(self, flights: Sequence[Flight], timeout_s: float, out_TH: torch.Tensor) -> int:
        """Add the first flights' answers to `out_TH` (float32 zeros [T, H]); how many they are.

        The others are to be received one by one, see `sum_answers`.
        """
        replies, tokens = [each.reply for each in flights], [each.part.tokens_T for each in flights]
        count = self._transport.sum_replies(replies, tokens, timeout_s, out_TH)
        for flight in flights[:count]:
            tokens_T = flight.part.tokens_T
            self._sender.settle(flight, (len(out_TH) if tokens_T is None else len(tokens_T)) * out_TH.shape[1] * 4)
        return count

    def _prepare(self, view: TableView, layer: int) -> _Layer | None:
        gate = self._gates.get(layer)
        here = all(replica.node == self._node or self._node is None for each in view.replicas for replica in each)
        if not isinstance(gate, CompiledGate) or not here or view.missing:
            return None
        index = view.slots(layer, frozenset())
        if index.num_experts < gate.formula.logits.num_outputs:
            return None
        return _Layer(gate=gate, index=index, run=_compiled(gate))


def _compiled(gate: CompiledGate) -> Callable[..., None]:
    # Loads LLVM, which a GPU's process does not need.
    from router_service._numba.ask_groups import compile_ask_groups

    return compile_ask_groups(*gate.formula.kind)
