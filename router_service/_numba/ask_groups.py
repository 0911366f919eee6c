"""A few tokens, from hidden states to a message for each group, compiled for this machine's CPU as one function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import Kind
from experts.wire._numba.write_call import compile_write_call
from router_service._numba.choose_experts import compile_choose_experts
from router_service._numba.split_rows import compile_split_rows


@cache
def compile_ask_groups(
    logits: Kind, score: str, weight: str, group_score: str | None, closed: float
) -> Callable[..., None]:
    """Gate, plan and messages; it runs without the GIL.

    Arguments: those of `compile_choose_experts`; then, as `compile_split_rows` has them, an empty int32 array, what it
    wants to know of slots, and what it fills; and
        call_ids      int64 [G]: of each group's message
        layer
        messages      uint8, room for the messages one behind the other, see `compile_write_call`
        ends_G        int64 [G]: where each group's ends, or would; what it fills
    """
    choose_experts = compile_choose_experts(logits, score, weight, group_score, closed)
    split_rows, write_call = compile_split_rows(), compile_write_call()

    def ask_groups(
        hidden_TH: Any,
        panels: Any,
        scales: Any,
        biases: Any,
        num_panels: Any,
        bias_E: Any,
        num_groups: Any,
        best_groups: Any,
        scale: Any,
        epsilon: Any,
        logits_TP: Any,
        expert_ids_TK: Any,
        weights_TK: Any,
        none: Any,
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
        call_ids: Any,
        layer: Any,
        messages: Any,
        ends_G: Any,
    ) -> None:
        choose_experts(
            *(hidden_TH, panels, scales, biases, num_panels, bias_E, num_groups, best_groups, scale, epsilon),
            *(logits_TP, expert_ids_TK, weights_TK),
        )
        split_rows(
            *(expert_ids_TK.reshape(-1), weights_TK.reshape(-1), none, none, len(hidden_TH)),
            *(slots_of_expert_EJ, num_slots_E, expert_of_slot_S, group_bounds_G1),
            *(weights_R, token_rows_R, experts_R, offsets_RG, tokens_R, shares_G3, rows_E),
        )
        row, expert, offset, token, position = 0, 0, 0, 0, 0
        for group in range(len(shares_G3)):
            rows, experts, tokens = shares_G3[group]
            if rows:
                position += write_call(
                    *(call_ids[group], layer, hidden_TH, tokens_R[token : token + tokens]),
                    *(experts_R[expert : expert + experts], offsets_RG[offset : offset + experts + 1]),
                    *(token_rows_R[row : row + rows], weights_R[row : row + rows], messages[position:]),
                )
                row, expert, offset, token = row + rows, expert + experts, offset + experts + 1, token + tokens
            ends_G[group] = position

    ints, wides, floats, single = types.int32[::1], types.int64[::1], types.float32[:, ::1], types.float32
    signature = types.void(
        *(floats, wides, wides, wides, types.int64, types.float32[::1], types.int64, types.int64, single, single),
        *(floats, types.int64[:, ::1], floats),
        *(ints, types.int32[:, ::1], ints, ints, ints),
        *(types.float32[::1], ints, ints, ints, ints, types.int64[:, ::1], wides),
        *(wides, types.int64, types.uint8[::1], wides),
    )
    return compiled(ask_groups, signature, variant=(*logits, score, weight, group_score, closed))
