"""Routed rows in the order of their slots, and each group's share of them, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from experts.ops._numba.object_cache import compiled


@cache
def compile_split_rows() -> Callable[..., None]:
    """A counting sort over slots, then each group's experts and distinct tokens; it runs without the GIL.

    Arguments:
        expert_R      int64 [R], -1 for none;  weight_R  float32 [R]
        token_R       int32 [R], below `num_tokens`; empty: R / num_tokens rows of each token after the other
        slot_R        int32 [R]: of each row; S, the number of slots, for none; empty: an expert's slots take turns
        num_tokens
        slots_of_expert_EJ, num_slots_E, expert_of_slot_S, group_bounds_G1: see `router_service.slot_index.SlotIndex`
    What it fills, group after group:
        weights_R     float32 [R];  token_rows_R int32 [R]: into the group's tokens
        experts_R     int32 [R];  offsets_RG int32 [R + G]: of each expert's rows, counted from the group's first
        tokens_R      int32 [R]: the group's distinct tokens, ascending
        shares_G3     int64 [G, 3]: rows, experts and tokens of each group; no tokens where it needs all of them
    and adds each expert's rows to
        rows_E        int64 [E]
    Raises IndexError for an expert that is not below E.
    """

    def split_rows(
        expert_R: Any,
        weight_R: Any,
        token_R: Any,
        slot_R: Any,
        num_tokens: Any,
        slots_of_expert_EJ: Any,
        num_slots_E: Any,
        expert_of_slot_S: Any,
        group_bounds_G1: Any,
        weights_R: Any,
        token_rows_R: Any,
        experts_R: Any,
        offsets_RG: Any,
        tokens_R: Any,
        shares_G3: Any,
        rows_E: Any,
    ) -> None:
        num_slots, num_rows = len(expert_of_slot_S), len(expert_R)
        starts = np.zeros(num_slots + 2, np.int64)
        tokens, slots = np.empty(num_rows, np.int32), np.empty(num_rows, np.int32)
        for row in range(num_rows):
            expert = expert_R[row]
            if expert < -1 or expert >= len(rows_E):
                raise IndexError("an expert that the layer does not have")
            tokens[row] = token_R[row] if len(token_R) else row * num_tokens // num_rows
            if len(slot_R):
                slots[row] = slot_R[row]
            else:
                # The token's number picks the slot: even load without state, and the same plan for the same batch.
                slots[row] = slots_of_expert_EJ[expert, tokens[row] % num_slots_E[expert]]
            if expert >= 0:
                rows_E[expert] += 1
            starts[slots[row] + 1] += 1
        for slot in range(num_slots + 1):
            starts[slot + 1] += starts[slot]
        place = starts[: num_slots + 1].copy()
        for row in range(num_rows):
            at = place[slots[row]]
            place[slots[row]] += 1
            if slots[row] < num_slots:
                weights_R[at] = weight_R[row]
                token_rows_R[at] = tokens[row]
        number = np.empty(num_tokens, np.int32)
        expert, token, offset = 0, 0, 0
        for group in range(len(shares_G3)):
            first, last = starts[group_bounds_G1[group]], starts[group_bounds_G1[group + 1]]
            num_experts, num_distinct = 0, 0
            if first < last:
                for slot in range(group_bounds_G1[group], group_bounds_G1[group + 1]):
                    if starts[slot] < starts[slot + 1]:
                        experts_R[expert + num_experts] = expert_of_slot_S[slot]
                        offsets_RG[offset + num_experts] = starts[slot] - first
                        num_experts += 1
                offsets_RG[offset + num_experts] = last - first
                offset += num_experts + 1
                number[:] = -1
                for row in range(first, last):
                    if number[token_rows_R[row]] < 0:
                        number[token_rows_R[row]] = 0
                        num_distinct += 1
                if num_distinct == num_tokens:
                    num_distinct = 0
                else:
                    following = 0
                    for each in range(num_tokens):
                        if number[each] == 0:
                            number[each] = following
                            tokens_R[token + following] = each
                            following += 1
                    for row in range(first, last):
                        token_rows_R[row] = number[token_rows_R[row]]
            shares_G3[group, 0], shares_G3[group, 1], shares_G3[group, 2] = last - first, num_experts, num_distinct
            expert += num_experts
            token += num_distinct

    ints, floats = types.int32[::1], types.float32[::1]
    signature = types.void(
        *(types.int64[::1], floats, ints, ints, types.int64, types.int32[:, ::1], ints, ints, ints),
        *(floats, ints, ints, ints, ints, types.int64[:, ::1], types.int64[::1]),
    )
    return compiled(split_rows, signature, variant=())
