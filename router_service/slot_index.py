"""One layer's slots as arrays, in the order in which routed rows are sorted."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SlotIndex:
    """S slots of one layer, ascending by (group, expert). "No expert" (-1) is a slot after the last.

    expert_of_slot_S:  which expert each slot holds
    group_of_slot_S:   which group it is in
    group_bounds_G1:   slots of group g are `group_bounds[g]:group_bounds[g + 1]`
    slots_of_expert_EJ: [E + 1, J] slots of each expert, J the most any expert has, shorter rows repeated
                       cyclically; the last row, which index -1 also reaches, is the slot S
    num_slots_E:       [E + 1] how many slots each expert has, 1 for the last row
    """

    expert_of_slot_S: IntArray
    group_of_slot_S: IntArray
    group_bounds_G1: IntArray
    slots_of_expert_EJ: IntArray
    num_slots_E: IntArray

    @property
    def num_experts(self) -> int:
        return len(self.num_slots_E) - 1

    @property
    def redundant(self) -> bool:
        """Some expert has a choice of slots."""
        return len(self.slots_of_expert_EJ[0]) > 1


def build_slot_index(holders: Sequence[Sequence[int]], num_groups: int, avoid: Set[int] = frozenset()) -> SlotIndex:
    """Index a layer's `holders` (groups of each expert).

    avoid: groups to leave out; an expert that only they hold keeps its first one, so that its rows have
           somewhere to wait
    """
    kept = [[group for group in groups if group not in avoid] or list(groups[:1]) for groups in holders]
    slots = sorted((group, expert) for expert, groups in enumerate(kept) for group in groups)
    group_S = np.array([group for group, _ in slots], dtype=np.int32)
    expert_S = np.array([expert for _, expert in slots], dtype=np.int32)
    count_E = np.array([len(groups) for groups in kept] + [1], dtype=np.int32)
    slot_of = {slot: index for index, slot in enumerate(slots)}
    width = int(count_E.max())
    slots_EJ = np.full((len(kept) + 1, width), len(slots), dtype=np.int32)
    for expert, groups in enumerate(kept):
        slots_EJ[expert] = [slot_of[groups[j % len(groups)], expert] for j in range(width)]
    return SlotIndex(
        expert_of_slot_S=expert_S,
        group_of_slot_S=group_S,
        group_bounds_G1=np.searchsorted(group_S, np.arange(num_groups + 1)).astype(np.int32),
        slots_of_expert_EJ=slots_EJ,
        num_slots_E=count_E,
    )
