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

    One sort over all rows, then a dozen array operations for each group that has any.
    """
    if slot_R is None:
        # The token's number picks the slot: even load without state, and the same plan for the same batch.
        turn_R = token_R % index.num_slots_E[expert_R] if index.redundant else 0
        slot_R = index.slots_of_expert_EJ[expert_R, turn_R]
    num_slots = len(index.expert_of_slot_S)
    # Stable sort of 16-bit keys is a radix sort.
    order_R = (slot_R.astype(np.int16) if num_slots < 2**15 else slot_R).argsort(kind="stable")
    slot_R, token_R, weight_R = slot_R[order_R], token_R[order_R], weight_R[order_R]
    # Rows of group g; "no expert" sorts behind the last.
    row_bounds = slot_R.searchsorted(index.group_bounds_G1).tolist()
    used = [group for group, first in enumerate(row_bounds[:-1]) if first < row_bounds[group + 1]]
    tokens = _distinct_tokens(num_tokens, token_R, used, row_bounds)

    parts = []
    for group, (tokens_T, token_rows_R) in zip(used, tokens, strict=True):
        rows = slice(row_bounds[group], row_bounds[group + 1])
        slots_R = slot_R[rows]
        first_R = np.empty(len(slots_R) + 1, dtype=bool)
        first_R[0] = first_R[-1] = True
        np.not_equal(slots_R[1:], slots_R[:-1], out=first_R[1:-1])
        offsets_S1 = first_R.nonzero()[0].astype(np.int32)
        parts.append(
            GroupPart(
                group=group,
                layer=layer,
                tokens_T=tokens_T,
                expert_ids_S=index.expert_of_slot_S[slots_R[offsets_S1[:-1]]],
                offsets_S1=offsets_S1,
                token_rows_R=token_rows_R,
                weights_R=weight_R[rows],
            )
        )
    return tuple(parts)


def _distinct_tokens(
    num_tokens: int, token_R: IntArray, used: list[int], row_bounds: list[int]
) -> list[tuple[IntArray | None, IntArray]]:
    """(tokens_T, token_rows_R) of each group in `used`, whose rows are `row_bounds[g]:row_bounds[g + 1]`."""
    if num_tokens == 1:
        return [(None, token_R[row_bounds[group] : row_bounds[group + 1]]) for group in used]
    found: list[tuple[IntArray | None, IntArray]] = []
    for group in used:
        rows_R = token_R[row_bounds[group] : row_bounds[group + 1]]
        marked = np.zeros(num_tokens, dtype=bool)
        marked[rows_R] = True
        tokens_T = marked.nonzero()[0].astype(np.int32)
        if len(tokens_T) == num_tokens:
            found.append((None, rows_R))
            continue
        number = np.empty(num_tokens, dtype=np.int32)
        number[tokens_T] = np.arange(len(tokens_T), dtype=np.int32)
        found.append((tokens_T, number[rows_R]))
    return found
