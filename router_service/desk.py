"""What a small batch needs besides itself: its layer, made ready for compiled code, a lane, and memory to work in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from experts.wire.lane import Lane
from router_service.dispatch import SplitRows
from router_service.gating.compiled_gate import CompiledGate
from router_service.slot_index import IntArray, SlotIndex
from router_service.table_view import TableView

MOST_TOKENS = 64
"""Of a small batch; the messages of more are too long to be copied twice."""
Shape = tuple[int, int, int, int]
# What surrounds the numbers of a message is shorter.
_FRAME_BYTES = 128


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerBatches:
    """A layer's gate and slots, and what compiled code wants to know of them."""

    gate: CompiledGate
    index: SlotIndex
    run: Callable[..., bool]

    @property
    def shape(self) -> Shape:
        """What a desk's memory depends on: hidden size, experts a token, columns of logits, experts."""
        logits = self.gate.formula.logits
        return logits.panels.shape[1], self.gate.formula.top_k, logits.num_columns, self.index.num_experts

    @property
    def slots(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        index = self.index
        return index.slots_of_expert_EJ, index.num_slots_E, index.expert_of_slot_S, index.group_bounds_G1


class Desk:
    """A lane to a table's groups, and memory for the batch that is on it: see `compile_ask_groups`."""

    def __init__(self, lane: Lane, view: TableView, here: LayerBatches) -> None:
        hidden_size, top_k, num_columns, _ = self.shape = here.shape
        rows = MOST_TOKENS * top_k
        self.lane = lane
        self.view = view
        self.call_id = 0
        self.logits_TP = np.empty((MOST_TOKENS, num_columns), np.float32)
        self.expert_ids_TK = np.empty((MOST_TOKENS, top_k), np.int64)
        self.weights_TK = np.empty((MOST_TOKENS, top_k), np.float32)
        self.split = SplitRows.of(here.index, rows)
        self.message = np.empty(MOST_TOKENS * hidden_size * 4 + 16 * rows + _FRAME_BYTES, np.uint8)
        self.values = np.empty(MOST_TOKENS * hidden_size, np.float32)
        self.progress = np.zeros(2, np.int64)

    def choice(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights of the batch that was gated last."""
        return torch.from_numpy(self.expert_ids_TK[:num_tokens]), torch.from_numpy(self.weights_TK[:num_tokens])
