"""Which rows go to which group: the plan that dispatch makes and combine consumes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from experts.spec import ExpertCall
from router_service.node_cover import NodeCover
from router_service.slot_index import IntArray, SlotIndex


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupPart:
    """What one group does for one batch of T tokens: R rows of T' distinct tokens, sorted by expert.

    tokens_T:     int32 [T'], ascending, which of the batch's tokens the group needs; None: all of them
    expert_ids_S, offsets_S1, token_rows_R (into tokens_T), weights_R: as in `ExpertCall`
    """

    group: int
    layer: int
    tokens_T: IntArray | None
    expert_ids_S: IntArray
    offsets_S1: IntArray
    token_rows_R: IntArray
    weights_R: npt.NDArray[np.float32]

    def call(self, hidden_TH: torch.Tensor) -> ExpertCall:
        """The call to send, each distinct token's hidden state once; `hidden_TH` is the whole batch."""
        if self.tokens_T is not None:
            hidden_TH = hidden_TH.index_select(0, torch.from_numpy(self.tokens_T).to(hidden_TH.device))
        return ExpertCall(
            layer=self.layer,
            hidden_TH=hidden_TH,
            expert_ids_S=torch.from_numpy(self.expert_ids_S),
            offsets_S1=torch.from_numpy(self.offsets_S1),
            token_rows_R=torch.from_numpy(self.token_rows_R),
            weights_R=torch.from_numpy(self.weights_R),
        )

    def rows(self) -> tuple[IntArray, IntArray, npt.NDArray[np.float32]]:
        """(expert_R, token_R of the batch, weight_R), to plan this part again."""
        expert_R = np.repeat(self.expert_ids_S, np.diff(self.offsets_S1))
        token_R = self.token_rows_R if self.tokens_T is None else self.tokens_T[self.token_rows_R]
        return expert_R, token_R, self.weights_R


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DispatchPlan:
    """Parts ascending by group: the order in which combine adds them.

    tokens_per_expert_E: int64, how many tokens chose each expert
    """

    num_tokens: int
    parts: tuple[GroupPart, ...]
    tokens_per_expert_E: npt.NDArray[np.int64]


def plan_dispatch(
    index: SlotIndex,
    layer: int,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    cover: NodeCover | None = None,
) -> DispatchPlan:
    """Split a batch over groups.

    expert_ids_TK: int64 or int32, -1 for no expert; the caller has checked the range
    weights_TK:    float32
    cover:         of `index`; chooses among an expert's slots so that tokens touch few nodes
    """
    num_tokens, top_k = expert_ids_TK.shape
    expert_R = expert_ids_TK.detach().cpu().numpy().reshape(-1)
    weight_R = weights_TK.detach().cpu().numpy().reshape(-1)
    token_R = np.repeat(np.arange(num_tokens, dtype=np.int32), top_k)
    slot_R = cover(expert_R.reshape(num_tokens, top_k)).reshape(-1) if cover is not None else None
    return DispatchPlan(
        num_tokens=num_tokens,
        parts=plan_rows(index, layer, num_tokens, expert_R, token_R, weight_R, slot_R),
        tokens_per_expert_E=np.bincount(expert_R + 1, minlength=index.num_experts + 1)[1:],
    )


def plan_rows(
    index: SlotIndex,
    layer: int,
    num_tokens: int,
    expert_R: npt.NDArray[np.integer],
    token_R: IntArray,
    weight_R: npt.NDArray[np.float32],
    slot_R: IntArray | None = None,
) -> tuple[GroupPart, ...]:
    """Split routed rows (expert, token, weight; token ascending within an expert's rows) over groups.

    slot_R: the slot that each row goes to; None: an expert's slots share its rows evenly.

    Every array is made once for all groups and sliced: the cost grows with rows and with tokens times
    groups, and hardly with the number of groups at decode sizes.
    """
    if slot_R is None:
        # The token's number picks the slot: even load without state, and the same plan for the same batch.
        turn_R = token_R % index.num_slots_E[expert_R] if index.redundant else 0
        slot_R = index.slots_of_expert_EJ[expert_R, turn_R]
    num_slots = len(index.expert_of_slot_S)
    # Stable sort of 16-bit keys is a radix sort.
    order_R = np.argsort(slot_R.astype(np.int16) if num_slots < 2**15 else slot_R, kind="stable")
    count_S = np.bincount(slot_R, minlength=num_slots + 1)[:num_slots]
    order_R = order_R[: int(count_S.sum())]
    slot_R, token_R, weight_R = slot_R[order_R], token_R[order_R], weight_R[order_R]

    # Distinct tokens of each group: mark (group, token) cells, number the marked ones.
    cell_R = index.group_of_slot_S[slot_R] * num_tokens + token_R
    num_groups = len(index.group_bounds_G1) - 1
    marked = np.zeros(num_groups * num_tokens, dtype=bool)
    marked[cell_R] = True
    cells = np.flatnonzero(marked)
    number = np.empty(len(marked), dtype=np.int32)
    number[cells] = np.arange(len(cells), dtype=np.int32)
    number_R = number[cell_R]
    token_C = (cells % num_tokens).astype(np.int32)

    used_S = np.flatnonzero(count_S)
    expert_ids = index.expert_of_slot_S[used_S]
    ends = np.zeros(len(used_S) + 1, dtype=np.int32)
    np.cumsum(count_S[used_S], out=ends[1:])
    group_used_S = index.group_of_slot_S[used_S]
    first_of_group = np.flatnonzero(np.diff(group_used_S, prepend=-1)).tolist()

    parts = []
    for position, start in enumerate(first_of_group):
        stop = first_of_group[position + 1] if position + 1 < len(first_of_group) else len(used_S)
        offsets_S1 = ends[start : stop + 1]
        first_row, last_row = int(offsets_S1[0]), int(offsets_S1[-1])
        group = int(group_used_S[start])
        first_cell, last_cell = np.searchsorted(cells, (group * num_tokens, (group + 1) * num_tokens))
        parts.append(
            GroupPart(
                group=group,
                layer=layer,
                tokens_T=None if last_cell - first_cell == num_tokens else token_C[first_cell:last_cell],
                expert_ids_S=expert_ids[start:stop],
                offsets_S1=offsets_S1 - first_row,
                token_rows_R=number_R[first_row:last_row] - np.int32(first_cell),
                weights_R=weight_R[first_row:last_row],
            )
        )
    return tuple(parts)
