"""Expert capacity: no expert takes more than its share of a batch.

Source: Lepikhin et al. 2020, "GShard" (arXiv 2006.16668), algorithm 1, and Fedus et al. 2021, "Switch Transformers"
(arXiv 2101.03961), equation 3: capacity = ceil(T * K / E * factor). Off unless a config asks for it: outputs then
depend on what else is in the batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from router_service.gating.gate import ChoiceLimit, Gate, GateOutput

Overflow = Literal["drop", "next_best"]


class CapacityGate:
    """Wraps a gate. Experts fill up with all first choices in token order, then all second choices, and so on. A token
    with NaN scores keeps its K experts and takes no place in them.

    overflow: "drop" leaves the expert out for the token (id -1, weight 0, the other weights as they were);
              "next_best" takes the token's best expert that has room, weighted by the gate's own formula, and drops
              where none has
    dropped, rerouted: how many choices met either end, ever
    """

    def __init__(self, gate: Gate, num_experts: int, factor: float, overflow: Overflow) -> None:
        self._gate = gate
        self._num_experts = num_experts
        self._factor = factor
        self._overflow = overflow
        self.dropped = 0
        self.rerouted = 0

    def __call__(self, hidden_TH: torch.Tensor, limit: ChoiceLimit | None = None) -> GateOutput:
        seen: list[torch.Tensor] = []

        def look(choice_TE: torch.Tensor, top_k: int) -> torch.Tensor:
            seen.append(choice_TE if limit is None else limit(choice_TE, top_k))
            return seen[-1]

        first = self._gate(hidden_TH, look)
        num_tokens, top_k = first.expert_ids_TK.shape
        capacity = math.ceil(num_tokens * top_k / self._num_experts * self._factor)
        sound_T1 = ~first.weights_TK.isnan().any(dim=1, keepdim=True)
        # The others queue at an expert that is none.
        ids_TK = first.expert_ids_TK.masked_fill(~sound_T1, self._num_experts)
        over_TK = (_rank_in_expert(ids_TK, self._num_experts + 1) >= capacity) & sound_T1
        num_over = int(over_TK.sum())
        if not num_over:
            return first
        if self._overflow == "drop":
            self.dropped += num_over
            return _without(first, over_TK)
        assigned_TE, num_rerouted = _reroute(seen[0], first.expert_ids_TK, over_TK, sound_T1, capacity)
        self.rerouted += num_rerouted
        self.dropped += num_over - num_rerouted
        # Only what was assigned is open, so the gate itself weights it.
        final = self._gate(hidden_TH, lambda choice_TE, top_k: seen[0].masked_fill(~assigned_TE, -math.inf))
        return _without(final, ~assigned_TE.gather(1, final.expert_ids_TK))


def _rank_in_expert(expert_ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How many choices of the same expert come before each, by (k, token)."""
    ids_R = expert_ids_TK.T.reshape(-1)
    order_R = ids_R.argsort(stable=True)
    start_E = torch.bincount(ids_R, minlength=num_experts).cumsum(0).roll(1)
    start_E[0] = 0
    rank_R = torch.empty_like(ids_R)
    rank_R[order_R] = torch.arange(len(ids_R), device=ids_R.device) - start_E[ids_R[order_R]]
    return rank_R.view(expert_ids_TK.shape[1], -1).T


def _without(output: GateOutput, dropped_TK: torch.Tensor) -> GateOutput:
    return GateOutput(output.expert_ids_TK.masked_fill(dropped_TK, -1), output.weights_TK.masked_fill(dropped_TK, 0.0))


def _reroute(
    choice_TE: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    over_TK: torch.Tensor,
    sound_T1: torch.Tensor,
    capacity: int,
) -> tuple[torch.Tensor, int]:
    """(assigned_TE bool, how many overflowed choices found another expert).

    sound_T1: the tokens that take places

    Rounds: every token that still lacks an expert asks for its best one with room; each takes the first askers.
    """
    num_experts = choice_TE.shape[1]
    assigned_TE = torch.zeros(choice_TE.shape, dtype=torch.bool, device=choice_TE.device)
    assigned_TE.scatter_(1, expert_ids_TK, True)
    tokens, choices = over_TK.nonzero(as_tuple=True)
    refused_TE = torch.zeros_like(assigned_TE)
    refused_TE[tokens, expert_ids_TK[tokens, choices]] = True
    assigned_TE &= ~refused_TE
    lacking_T = over_TK.sum(dim=1)
    rerouted = 0
    while True:
        room_E = capacity - (assigned_TE & sound_T1).sum(dim=0)
        open_TE = choice_TE.masked_fill(assigned_TE | refused_TE | (room_E <= 0), -math.inf)
        best_T = open_TE.max(dim=1)
        asking = ((lacking_T > 0) & (best_T.values > -math.inf)).nonzero().squeeze(1)
        if not len(asking):
            return assigned_TE, rerouted
        wanted = best_T.indices[asking]
        taken = asking[_rank_in_expert(wanted[:, None], num_experts).squeeze(1) < room_E[wanted]]
        assigned_TE[taken, best_T.indices[taken]] = True
        lacking_T[taken] -= 1
        rerouted += len(taken)
