"""Several layers of a decode step, one after the other, as one function compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import types

from cluster.serving._numba.shared_work import hear, now, tell
from experts.ops._numba.call import address_of, caller_of
from experts.ops._numba.expert_mlp import compile_expert_mlp
from experts.ops._numba.object_cache import compiled, part
from experts.ops._numba.packed_matmul import Kind
from experts.ops._numba.tickets import offer_tickets, take_ticket
from experts.wire._numba import SOURCES as WIRE_SOURCES
from experts.wire._numba.add_answers import SUMMED, compile_add_answers
from router_service._numba import SOURCES as ROUTER_SOURCES
from router_service._numba.ask_groups import compile_ask_groups

GateKind = tuple[Kind, str, str, str | None, float]
NOT_ASKED, DESERTED = 3, 4
"""Besides how adding ended: a socket did not take its message; a helper ended before its part of the attention did."""
ENDS = 5
"""Ways in which a layer may end, SUMMED among them."""
_NO_LIMIT, _NO_SHIFT = np.float32(np.inf), np.float32(0)
_INTS, _WIDES, _NUMBERS = types.int32[::1], types.int64[:, ::1], types.int64[::1]
_FLOATS, _VECTOR, _CUBE = types.float32[:, ::1], types.float32[::1], types.int64[:, :, ::1]
_WIDE_INTS = types.int32[:, ::1]
_GATES = types.Tuple((_WIDES, _WIDES, _WIDES, _NUMBERS, _FLOATS, _VECTOR))
_SLOTS = types.Tuple((types.int32[:, :, ::1], _WIDE_INTS, _WIDE_INTS, _WIDE_INTS))
_CHOSEN = types.Tuple((_FLOATS, _WIDES, _FLOATS, _INTS))
_SPLIT = types.Tuple((_VECTOR, _INTS, _INTS, _INTS, _INTS))
_LANE = types.Tuple((_NUMBERS, _NUMBERS, types.uint8[::1], _VECTOR, _NUMBERS))
_SHARED = types.Tuple((_CUBE, _NUMBERS, _NUMBERS, _INTS, _FLOATS, _FLOATS, _FLOATS, _FLOATS))


class Attention(NamedTuple):
    """A family's function for rows of a step, what it calls, what tells it from others, and the types of its constants
    and of what it works in."""

    attend: Callable[..., None]
    address: int
    kind: tuple[Any, ...]
    constants: Any
    work: Any


class DecodeLayers(NamedTuple):
    """run: the thread that goes from layer to layer;  help: another, which takes parts of each layer's attention

    code: int64 [4], addresses of what they call: attention, gate and messages, shared experts, adding
    """

    run: Callable[..., int]
    help: Callable[..., None]
    code: npt.NDArray[np.int64]


@cache
def compile_decode_layers(attention: Attention, gate: GateKind, shared: tuple[str, str] | None) -> DecodeLayers:
    """Both run without the GIL.

    shared: formats of the shared experts' matrices, None where there are none

    Arguments of `run`, after `code`, for T rows with one new token each and L layers:
        hidden        float32 [T, H], in and out
        residual, mlp_in, combined  float32 [T, H], to work in; where a layer does not end as it should, its attention
                      with the residual, the norm of that, and what is there of its answers' sum
        constants, work   see the family's `attend_rows`;  cos, sin  float32 [T, D]
        parts         int64 [L, P, 6]: first row of a part of the step, the row after its last, and its caches
        slots, positions  int64 [T]
        tickets       int64 [1], to work in;  helper  of a socket to all who help, and how many there are
        layers        int64 [L], their numbers
        gates         (panels, scales, biases, int64 [L, 1] each; int64 [3]: panels of a gate, groups, best groups;
                      bias float32 [L, E]; float32 [2]: scale and epsilon), see `compile_choose_experts`
        slots_of      (slots_of_expert_LEJ, num_slots_LE, expert_of_slot_LS, group_bounds_LG), see `compile_split_rows`
        chosen        (logits_TP, expert_ids_TK, weights_TK, an empty int32 array), see `compile_ask_groups`
        split         (weights_R, token_rows_R, experts_R, offsets_RG, tokens_R), see there
        shares, rows  int64 [L, G, 3], [L, E]: what is written there of each layer
        lane          (sockets_G; the call before the first, and the longest wait in milliseconds; message; values;
                      progress), see `compile_add_answers`
        experts       of the shared experts (addresses int64 [L, 6, 1]; and of `compile_expert_mlp` panels, starts,
                      token_rows, rows, up, inner, out)
        times         float64 [L, 5]: when a layer began, had its attention, had asked, was done with its shared
                      experts, and had its answers; on the monotonic clock
    Returns ENDS * (layers that ended as they should) + how the one after them ended: SUMMED where there is none.
    """
    attend, has_shared = attention.attend, shared is not None
    up_format, down_format = shared or ("float32", "float32")
    called = (
        compile_ask_groups(*gate),
        compile_expert_mlp("silu", gated=True, biased=False, up_format=up_format, down_format=down_format),
        compile_add_answers(),
    )
    ask_groups, compute_shared, add_answers = map(caller_of, called)
    variant = (attention.kind, has_shared, WIRE_SOURCES, ROUTER_SOURCES)

    @part(variant)
    def take_parts(  # type: ignore[no-untyped-def]
        address, tickets, socket, parts, hidden, residual, mlp_in, constants, cos, sin, slots, positions, work
    ):
        taken = 0
        while True:
            ticket = take_ticket(tickets.ctypes.data)
            number, at = ticket >> 32, ticket & 0xFFFFFFFF
            if at >= parts.shape[1]:
                return taken
            rows, caches = slice(parts[number, at, 0], parts[number, at, 1]), parts[number, at, 2:]
            attend(address, number, rows, hidden, residual, mlp_in, constants, cos, sin, caches, slots, positions, work)
            taken += 1
            if socket >= 0:
                tell(socket)

    def help_decode(
        code: Any,
        socket: Any,
        tickets: Any,
        parts: Any,
        hidden: Any,
        residual: Any,
        mlp_in: Any,
        constants: Any,
        cos: Any,
        sin: Any,
        slots: Any,
        positions: Any,
        work: Any,
    ) -> None:
        while hear(socket):
            take_parts(
                *(
                    code[0],
                    tickets,
                    socket,
                    parts,
                    hidden,
                    residual,
                    mlp_in,
                    constants,
                    cos,
                    sin,
                    slots,
                    positions,
                    work,
                )
            )

    def decode_layers(
        code: Any,
        hidden: Any,
        residual: Any,
        mlp_in: Any,
        combined: Any,
        constants: Any,
        work: Any,
        cos: Any,
        sin: Any,
        parts: Any,
        slots: Any,
        positions: Any,
        tickets: Any,
        helper: Any,
        num_helpers: Any,
        layers: Any,
        gates: Any,
        slots_of: Any,
        chosen: Any,
        split: Any,
        shares: Any,
        rows: Any,
        lane: Any,
        experts: Any,
        times: Any,
    ) -> Any:
        num_tokens, hidden_size = hidden.shape
        for number in range(len(layers)):
            times[number, 0] = now()
            offer_tickets(tickets.ctypes.data, number << 32)
            for _ in range(num_helpers):
                tell(helper)
            taken = take_parts(
                *(code[0], tickets, -1, parts, hidden, residual, mlp_in, constants, cos, sin, slots, positions, work)
            )
            for _ in range(parts.shape[1] - taken):
                if not hear(helper):
                    return number * ENDS + DESERTED
            times[number, 1] = now()
            call_id = lane[1][0] + number + 1
            arguments = (
                mlp_in, gates[0][number], gates[1][number], gates[2][number], gates[3][0], gates[4][number],
                gates[3][1], gates[3][2], gates[5][0], gates[5][1], chosen[0], chosen[1], chosen[2], chosen[3],
                slots_of[0][number], slots_of[1][number], slots_of[2][number], slots_of[3][number],
                split[0], split[1], split[2], split[3], split[4], shares[number], rows[number],
                lane[0], call_id, layers[number], lane[2],
            )  # fmt: skip
            asked = ask_groups(code[1], arguments)
            times[number, 2] = now()
            if not asked:
                return number * ENDS + NOT_ASKED
            if has_shared:
                of_shared = (
                    experts[0][number], experts[1], experts[2], mlp_in, experts[3], _NO_LIMIT, _NO_SHIFT,
                    experts[4], experts[5], experts[6], experts[7],
                )  # fmt: skip
                compute_shared(code[2], of_shared)
            times[number, 3] = now()
            lane[4][:] = 0
            answers = (
                lane[0], call_id, shares[number], split[4], lane[4], lane[1][1], lane[2], lane[3], combined,
            )  # fmt: skip
            ended = add_answers(code[3], answers)
            times[number, 4] = now()
            if ended != SUMMED:
                return number * ENDS + ended
            for row in range(num_tokens):
                for i in range(hidden_size):
                    made = combined[row, i]
                    if has_shared:
                        made += experts[7][row, i]
                    hidden[row, i] = residual[row, i] + made
        return len(layers) * ENDS + SUMMED

    common = (_FLOATS, _FLOATS, _FLOATS)
    seen = attention.constants, _FLOATS, _FLOATS, _NUMBERS, _NUMBERS, attention.work
    help_signature = types.void(_NUMBERS, types.int64, _NUMBERS, _CUBE, *common, *seen)
    run_signature = types.int64(
        *(
            _NUMBERS,
            *common,
            _FLOATS,
            attention.constants,
            attention.work,
            _FLOATS,
            _FLOATS,
            _CUBE,
            _NUMBERS,
            _NUMBERS,
        ),
        *(_NUMBERS, types.int64, types.int64, _NUMBERS, _GATES, _SLOTS, _CHOSEN, _SPLIT, _CUBE, _WIDES, _LANE, _SHARED),
        types.float64[:, ::1],
    )
    return DecodeLayers(
        compiled(decode_layers, run_signature, variant=variant),  # type: ignore[arg-type]
        compiled(help_decode, help_signature, variant=variant),
        np.array([attention.address, *map(address_of, called)]),
    )
