"""A few tokens, from hidden states to a message on its way to each group, compiled for this CPU as one function."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from numba import types

from experts.ops._numba.object_cache import compiled
from experts.ops._numba.packed_matmul import Kind
from experts.wire._numba import SOURCES
from experts.wire._numba.sockets import LENGTH_BYTES, send_framed
from experts.wire._numba.write_call import compile_write_call
from router_service._numba.choose_experts import compile_choose_experts
from router_service._numba.split_rows import compile_split_rows


@cache
def compile_ask_groups(
    logits: Kind, score: str, weight: str, group_score: str | None, closed: float
) -> Callable[..., bool]:
    """Gate, plan, messages and their sending; it runs without the GIL. False where a socket does not take its message.

    Arguments: those of `compile_choose_experts`; then, as `compile_split_rows` has them, an empty int32 array, what it
    wants to know of slots, and what it fills, with room for as many rows at least; and
        sockets_G     int64: of each group's stream
        call_id       of all messages
        layer
        message       uint8, room for any one of them, see `compile_write_call`
    `expert_ids_TK` and `weights_TK` have room for as many tokens at least. `rows_E` is this batch's.
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
        sockets_G: Any,
        call_id: Any,
        layer: Any,
        message: Any,
    ) -> Any:
        num_tokens = len(hidden_TH)
        chosen_TK, worth_TK = expert_ids_TK[:num_tokens], weights_TK[:num_tokens]
        rows_E[:] = 0
        choose_experts(
            *(hidden_TH, panels, scales, biases, num_panels, bias_E, num_groups, best_groups, scale, epsilon),
            *(logits_TP, chosen_TK, worth_TK),
        )
        split_rows(
            *(chosen_TK.reshape(-1), worth_TK.reshape(-1), none, none, num_tokens),
            *(slots_of_expert_EJ, num_slots_E, expert_of_slot_S, group_bounds_G1),
            *(weights_R, token_rows_R, experts_R, offsets_RG, tokens_R, shares_G3, rows_E),
        )
        row, expert, offset, token = 0, 0, 0, 0
        for group in range(len(shares_G3)):
            rows, experts, tokens = shares_G3[group]
            if rows:
                size = write_call(
                    *(call_id, layer, hidden_TH, tokens_R[token : token + tokens]),
                    *(experts_R[expert : expert + experts], offsets_RG[offset : offset + experts + 1]),
                    *(token_rows_R[row : row + rows], weights_R[row : row + rows], message[LENGTH_BYTES:]),
                )
                if not send_framed(sockets_G[group], message, size):
                    return False
                row, expert, offset, token = row + rows, expert + experts, offset + experts + 1, token + tokens
        return True

    ints, wides, floats, single = types.int32[::1], types.int64[::1], types.float32[:, ::1], types.float32
    signature = types.boolean(
        *(floats, wides, wides, wides, types.int64, types.float32[::1], types.int64, types.int64, single, single),
        *(floats, types.int64[:, ::1], floats),
        *(ints, types.int32[:, ::1], ints, ints, ints),
        *(types.float32[::1], ints, ints, ints, ints, types.int64[:, ::1], wides),
        *(wides, types.int64, types.int64, types.uint8[::1]),
    )
    variant = *logits, score, weight, group_score, closed, SOURCES
    return compiled(ask_groups, signature, variant=variant)  # type: ignore[return-value]
