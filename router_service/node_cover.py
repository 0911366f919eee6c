"""Which slot of each expert a token uses, so that it touches as few nodes as can be. Changes no output."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from router_service.slot_index import IntArray, SlotIndex

BoolArray = npt.NDArray[np.bool_]

# Of a group's even share of a batch's rows. Small batches are not worth spreading.
_LOAD_BOUND = 1.25
_SMALL_ROWS = 64


class NodeCover:
    """Set cover for all tokens at once.

    For each token: the nodes that alone hold one of its experts, then whichever node covers most of what is left,
    until nothing is; where that took three or more such nodes and some pair would do, the pair. So the number of
    nodes is the least possible unless at least three nodes are needed beyond the ones that cannot be avoided. The
    router's own node is free and always used.

    Then rows move away from groups with more than `_LOAD_BOUND` times their even share of the batch's rows, and more
    than `_SMALL_ROWS`: until such a group has no row left whose expert has another slot in a group with room, that is
    below the bound. None goes above it for that, and no row moves to make room for another.

    index:           slots to choose from, some expert having several
    node_of_group_G: node number of each group
    local:           number of the router's node, None where it is none of them
    """

    def __init__(self, index: SlotIndex, node_of_group_G: IntArray, local: int | None) -> None:
        self._index = index
        self._local = local
        self._num_nodes = int(node_of_group_G.max()) + 1
        node_of_slot_S = node_of_group_G[index.group_of_slot_S]
        # [E + 1, N] a slot of each expert on each node, -1 for none; the last row is "no expert" (index -1).
        self._slot_EN = np.full((index.num_experts + 1, self._num_nodes), -1, dtype=np.int32)
        for slot, (expert, node) in enumerate(zip(index.expert_of_slot_S, node_of_slot_S, strict=True)):
            # Of several on one node, odd experts take the last and even ones the first: some spread at no cost.
            if self._slot_EN[expert, node] < 0 or expert % 2:
                self._slot_EN[expert, node] = slot
        self._held_EN = self._slot_EN >= 0

    def __call__(self, expert_ids_TK: npt.NDArray[np.integer]) -> IntArray:
        """slot_TK; `len(slots)` where there is no expert."""
        num_tokens = len(expert_ids_TK)
        held_TKN = self._held_EN[expert_ids_TK]
        forced_TN = (held_TKN & (held_TKN.sum(axis=2, keepdims=True) == 1)).any(axis=1)
        if self._local is not None:
            forced_TN[:, self._local] = True
        # Ties between nodes: each token begins to count at another node.
        turn_TN = (np.arange(self._num_nodes) - np.arange(num_tokens)[:, None]) % self._num_nodes
        chosen_TN = self._greedy(held_TKN, forced_TN, turn_TN)
        self._mend_with_pairs(held_TKN, forced_TN, chosen_TN)
        open_TKN = held_TKN & chosen_TN[:, None, :]
        node_TK = np.where(open_TKN, turn_TN[:, None, :] + 1, 0).argmax(axis=2)
        slot_TK: IntArray = self._slot_EN[expert_ids_TK, node_TK]
        slot_TK[expert_ids_TK < 0] = len(self._index.expert_of_slot_S)
        self._bound_load(expert_ids_TK, slot_TK)
        return slot_TK

    @staticmethod
    def _greedy(held_TKN: BoolArray, forced_TN: BoolArray, turn_TN: IntArray) -> BoolArray:
        num_nodes = forced_TN.shape[1]
        chosen_TN = forced_TN.copy()
        needed_TK: BoolArray = np.any(held_TKN, axis=2)
        needed_TK &= ~np.any(held_TKN & chosen_TN[:, None, :], axis=2)
        while len(lacking := np.flatnonzero(needed_TK.any(axis=1))):
            covers = (held_TKN[lacking] & needed_TK[lacking, :, None]).sum(axis=1)
            best = (covers * num_nodes + turn_TN[lacking]).argmax(axis=1)
            chosen_TN[lacking, best] = True
            needed_TK[lacking] &= ~held_TKN[lacking, :, best]
        return chosen_TN

    def _mend_with_pairs(self, held_TKN: BoolArray, forced_TN: BoolArray, chosen_TN: BoolArray) -> None:
        extra_T = chosen_TN.sum(axis=1) - forced_TN.sum(axis=1)
        tokens = np.flatnonzero(extra_T >= 3)
        if not len(tokens):
            return
        held = held_TKN[tokens]
        done = ~held.any(axis=2) | (held & forced_TN[tokens, None, :]).any(axis=2)
        left, right = np.triu_indices(self._num_nodes, k=1)
        enough = np.stack(
            [(done | held[:, :, a] | held[:, :, b]).all(axis=1) for a, b in zip(left, right, strict=True)], axis=1
        )
        mended = enough.any(axis=1)
        pair = enough.argmax(axis=1)[mended]
        tokens = tokens[mended]
        chosen_TN[tokens] = forced_TN[tokens]
        chosen_TN[tokens, left[pair]] = True
        chosen_TN[tokens, right[pair]] = True

    def _bound_load(self, expert_ids_TK: npt.NDArray[np.integer], slot_TK: IntArray) -> None:
        """Move rows of overfull groups to other slots of their expert, in place."""
        index = self._index
        slot_R, expert_R = slot_TK.reshape(-1), expert_ids_TK.reshape(-1)
        num_groups = len(index.group_bounds_G1) - 1
        group_of_slot_S = np.append(index.group_of_slot_S, num_groups)
        num_rows = int((expert_R >= 0).sum())
        cap = max(_SMALL_ROWS, int(np.ceil(_LOAD_BOUND * num_rows / num_groups)))
        for turn in range(1, index.slots_of_expert_EJ.shape[1]):
            while True:
                group_R = group_of_slot_S[slot_R]
                room_G = cap - np.bincount(group_R, minlength=num_groups + 1)
                room_G[num_groups] = 0
                over = np.flatnonzero(room_G[group_R] < 0)
                if not len(over):
                    return
                slots_J = index.slots_of_expert_EJ[expert_R[over]]
                now = (slots_J == slot_R[over, None]).argmax(axis=1)
                other = slots_J[np.arange(len(over)), (now + turn) % index.num_slots_E[expert_R[over]]]
                source, target = group_R[over], group_of_slot_S[other]
                moves = np.flatnonzero(room_G[target] > 0)
                # Room only shrinks: what finds none now never will.
                if not len(moves):
                    break
                moves = moves[_rank_in_group(source[moves]) < -room_G[source[moves]]]
                moves = moves[_rank_in_group(target[moves]) < room_G[target[moves]]]
                slot_R[over[moves]] = other[moves]


def _rank_in_group(group_R: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """How many earlier rows are in the same group."""
    order = np.argsort(group_R, kind="stable")
    ordered = group_R[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    rank = np.empty(len(group_R), dtype=np.int64)
    rank[order] = np.arange(len(group_R)) - starts
    return rank
