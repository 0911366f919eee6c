import math

import pytest
import torch

from router_service.gating.build import build_gate
from router_service.gating.capacity import CapacityGate
from router_service.gating.gate import GateSpec


@pytest.fixture
def gate():
    torch.manual_seed(0)
    weight_EH = torch.randn(8, 16)
    weight_EH[2] *= 3  # a favourite
    return build_gate(GateSpec(system="qwen3_moe", num_experts=8, num_experts_per_tok=2), weight_EH, None)


@pytest.fixture
def hidden_TH():
    return torch.randn(100, 16, generator=torch.Generator().manual_seed(1))


def every_expert(choice_TE, top_k):
    """A limit that closes none: a gate with a limit goes through the operators, which round otherwise."""
    return choice_TE


def fill(ids_TK, capacity):
    """Algorithm 1 of GShard, one choice at a time: which choices found their expert full."""
    taken, over = [0] * 8, torch.zeros(ids_TK.shape, dtype=torch.bool)
    for k in range(ids_TK.shape[1]):
        for token in range(len(ids_TK)):
            expert = int(ids_TK[token, k])
            over[token, k] = taken[expert] >= capacity
            taken[expert] += not over[token, k]
    return over, taken


def test_drop_fills_in_the_order_of_the_paper(gate, hidden_TH):
    plain, capped = gate(hidden_TH, every_expert), CapacityGate(gate, 8, 1.0, "drop")
    out = capped(hidden_TH)
    over, _ = fill(plain.expert_ids_TK, 25)
    assert torch.equal(out.expert_ids_TK, plain.expert_ids_TK.masked_fill(over, -1))
    assert torch.equal(out.weights_TK, plain.weights_TK.masked_fill(over, 0))
    assert capped.dropped == int(over.sum()) > 0


def test_next_best_is_a_better_expert_than_any_other_with_room(gate, hidden_TH):
    plain, capped = gate(hidden_TH), CapacityGate(gate, 8, 1.0, "next_best")
    out = capped(hidden_TH)
    over, _ = fill(plain.expert_ids_TK, 25)
    counts = torch.bincount(out.expert_ids_TK[out.expert_ids_TK >= 0], minlength=8)
    assert counts.max() <= 25
    assert capped.rerouted + capped.dropped == int(over.sum())
    assert capped.rerouted > 0
    every = build_all_scores(gate, hidden_TH)
    for token in range(100):
        ids = [e for e in out.expert_ids_TK[token].tolist() if e >= 0]
        assert len(set(ids)) == len(ids)
        kept = set(plain.expert_ids_TK[token][~over[token]].tolist())
        assert kept <= set(ids)
        for expert, weight in zip(out.expert_ids_TK[token].tolist(), out.weights_TK[token].tolist(), strict=True):
            assert weight == (pytest.approx(float(every[token, expert]), abs=1e-6) if expert >= 0 else 0)
        # Whoever was passed over for a worse expert is full.
        worst = min((float(every[token, e]) for e in ids), default=math.inf)
        for expert in set(range(8)) - set(ids):
            if float(every[token, expert]) > worst:
                assert counts[expert] == 25


def build_all_scores(gate, hidden_TH):
    seen = []
    gate(hidden_TH, lambda choice_TE, top_k: seen.append(choice_TE) or choice_TE)
    return seen[0]


def test_enough_room_changes_nothing(gate, hidden_TH):
    for overflow in ("drop", "next_best"):
        capped = CapacityGate(gate, 8, 8.0, overflow)
        plain = gate(hidden_TH, every_expert)
        assert all(torch.equal(a, b) for a, b in zip(capped(hidden_TH), plain, strict=True))
        assert (capped.dropped, capped.rerouted) == (0, 0)
