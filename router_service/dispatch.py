"""Which rows go to which group: the plan that dispatch makes and combine consumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from experts.errors import RequestError
from experts.spec import ExpertCall
from router_service.node_cover import NodeCover
from router_service.slot_index import IntArray, SlotIndex

_NONE: IntArray = np.empty(0, np.int32)


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


class SplitRows(NamedTuple):
    """What `compile_split_rows` fills."""

    weights_R: npt.NDArray[np.float32]
    token_rows_R: IntArray
    experts_R: IntArray
    offsets_RG: IntArray
    tokens_R: IntArray
    shares_G3: npt.NDArray[np.int64]
    rows_E: npt.NDArray[np.int64]

    @classmethod
    def of(cls, index: SlotIndex, num_rows: int) -> SplitRows:
        """To be filled with `num_rows` rows."""
        num_groups = len(index.group_bounds_G1) - 1
        return cls(
            np.empty(num_rows, np.float32),
            np.empty(num_rows, np.int32),
            np.empty(num_rows, np.int32),
            np.empty(num_rows + num_groups, np.int32),
            np.empty(num_rows, np.int32),
            np.empty((num_groups, 3), np.int64),
            np.zeros(index.num_experts, np.int64),
        )

    def parts(self, layer: int) -> tuple[GroupPart, ...]:
        """Each group's, of those that have rows."""
        parts = []
        row = expert = offset = token = 0
        for group, (rows, experts, tokens) in enumerate(self.shares_G3.tolist()):
            if rows:
                parts.append(
                    GroupPart(
                        group=group,
                        layer=layer,
                        tokens_T=self.tokens_R[token : token + tokens] if tokens else None,
                        expert_ids_S=self.experts_R[expert : expert + experts],
                        offsets_S1=self.offsets_RG[offset : offset + experts + 1],
                        token_rows_R=self.token_rows_R[row : row + rows],
                        weights_R=self.weights_R[row : row + rows],
                    )
                )
                row, expert, offset, token = row + rows, expert + experts, offset + experts + 1, token + tokens
        return tuple(parts)


def plan_dispatch(
    index: SlotIndex,
    layer: int,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    cover: NodeCover | None = None,
) -> DispatchPlan:
    """Split a batch over groups.

    expert_ids_TK: int64 or int32, -1 for no expert
    weights_TK:    float32
    cover:         of `index`; chooses among an expert's slots so that tokens touch few nodes

    Raises RequestError for an expert that the layer does not have.
    """
    num_tokens, top_k = expert_ids_TK.shape
    expert_R = np.ascontiguousarray(expert_ids_TK.detach().cpu().numpy().reshape(-1), np.int64)
    weight_R = np.ascontiguousarray(weights_TK.detach().cpu().numpy().reshape(-1), np.float32)
    slot_R = _NONE if cover is None else cover(expert_R.reshape(num_tokens, top_k)).reshape(-1)
    parts, tokens_per_expert_E = _plan(index, layer, num_tokens, expert_R, weight_R, _NONE, slot_R)
    return DispatchPlan(num_tokens=num_tokens, parts=parts, tokens_per_expert_E=tokens_per_expert_E)


def plan_rows(
    index: SlotIndex,
    layer: int,
    num_tokens: int,
    expert_R: npt.NDArray[np.integer],
    token_R: IntArray,
    weight_R: npt.NDArray[np.float32],
) -> tuple[GroupPart, ...]:
    """Split routed rows (expert, token, weight; token ascending within an expert's rows) over groups."""
    token_R = np.ascontiguousarray(token_R, np.int32)
    return _plan(index, layer, num_tokens, expert_R.astype(np.int64), np.ascontiguousarray(weight_R), token_R, _NONE)[0]


def _plan(
    index: SlotIndex,
    layer: int,
    num_tokens: int,
    expert_R: npt.NDArray[np.int64],
    weight_R: npt.NDArray[np.float32],
    token_R: IntArray,
    slot_R: IntArray,
) -> tuple[tuple[GroupPart, ...], npt.NDArray[np.int64]]:
    """Parts, and each expert's rows. For arguments that may be empty see `compile_split_rows`."""
    split = SplitRows.of(index, len(expert_R))
    try:
        compiled_split_rows()(
            *(expert_R, weight_R, token_R, np.ascontiguousarray(slot_R, np.int32), num_tokens),
            *(index.slots_of_expert_EJ, index.num_slots_E, index.expert_of_slot_S, index.group_bounds_G1),
            *split,
        )
    except IndexError:
        raise RequestError(
            f"expert_ids: reach from {expert_R.min()} to {expert_R.max()}; in this placement table layer {layer} has "
            f"experts 0 to {index.num_experts - 1}",
            "expert_ids",
        ) from None
    return split.parts(layer), split.rows_E


@cache
def compiled_split_rows() -> Callable[..., None]:
    """What sorts rows; the first call compiles it."""
    # Loads LLVM, which a group's process does not need from here.
    from router_service._numba.split_rows import compile_split_rows

    return compile_split_rows()
