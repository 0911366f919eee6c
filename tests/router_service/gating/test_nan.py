"""A token with NaN scores harms no other, in any gate, however it is computed, limited or capped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from router_service.gating.build import build_gate
from router_service.gating.capacity import CapacityGate, Overflow
from router_service.gating.compiled_gate import CompiledGate
from router_service.gating.gate import Gate, GateOutput, GateSpec
from router_service.node_limit import NodeLimit

HIDDEN, EXPERTS, TOKENS = 48, 16, 12
TOP_K = GateSpec(system="shazeer", num_experts=EXPERTS, num_experts_per_tok=4)
SPECS = {
    "shazeer": TOP_K,
    "gshard": replace(TOP_K, system="gshard", num_experts_per_tok=2),
    "switch": replace(TOP_K, system="switch", num_experts_per_tok=1),
    "glam": replace(TOP_K, system="glam", num_experts_per_tok=2),
    "mixtral": replace(TOP_K, system="mixtral", num_experts_per_tok=2),
    "grok_1": replace(TOP_K, system="grok_1", num_experts_per_tok=2),
    "qwen3": replace(TOP_K, system="qwen3_moe"),
    "qwen3, normalised": replace(TOP_K, system="qwen3_moe", norm_topk_prob=True),
    "v2, greedy": replace(TOP_K, system="deepseek_v2"),
    "v2": replace(TOP_K, system="deepseek_v2", n_group=4, topk_group=2),
    "v3": replace(TOP_K, system="deepseek_v3", norm_topk_prob=True, n_group=4, topk_group=2),
    "kimi_k2": replace(TOP_K, system="deepseek_v3", n_group=1, topk_group=1),
    "v4": replace(TOP_K, system="deepseek_v4"),
}
COMPILED = {"mixtral", "qwen3", "qwen3, normalised", "v2, greedy", "v2", "v3", "kimi_k2"}

Route = Callable[[torch.Tensor], GateOutput]


def build(name: str) -> Gate:
    generator = torch.Generator().manual_seed(1)
    weight_EH = torch.randn(EXPERTS, HIDDEN, generator=generator) * 0.3
    biased = SPECS[name].system in ("deepseek_v3", "deepseek_v4")
    return build_gate(SPECS[name], weight_EH, torch.randn(EXPERTS, generator=generator) * 0.2 if biased else None)


def batch() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2))


def check_own_row(output: GateOutput, token: int, top_k: int) -> None:
    """The token still has K distinct experts, and NaN weights."""
    assert len(set(output.expert_ids_TK[token].tolist()) - {-1}) == top_k
    assert output.weights_TK[token].isnan().all()


def ways(name: str) -> dict[str, Route]:
    gate = build(name)
    limit = NodeLimit(np.eye(4, dtype=bool)[np.arange(EXPERTS) // 4], 2)
    assert isinstance(gate, CompiledGate) == (name in COMPILED)
    operators = gate.gate if isinstance(gate, CompiledGate) else gate
    return {"built": gate, "operators": operators, "restrict": lambda hidden_TH: gate(hidden_TH, limit)}


@pytest.mark.parametrize("way", ["built", "operators", "restrict"])
@pytest.mark.parametrize("name", SPECS)
def test_spoils_no_other_token(name: str, way: str) -> None:
    route, hidden_TH = ways(name)[way], batch()
    whole = route(hidden_TH)
    hidden_TH[1, 7] = float("nan")
    chosen = route(hidden_TH)
    check_own_row(chosen, 1, SPECS[name].num_experts_per_tok)
    others = torch.arange(TOKENS) != 1
    assert torch.equal(chosen.expert_ids_TK[others], whole.expert_ids_TK[others])
    assert torch.equal(chosen.weights_TK[others], whole.weights_TK[others])


@pytest.mark.parametrize("max_nodes", [None, 2])
@pytest.mark.parametrize("overflow", ["drop", "next_best"])
@pytest.mark.parametrize("name", SPECS)
def test_takes_no_place_of_an_experts_capacity(name: str, overflow: Overflow, max_nodes: int | None) -> None:
    """The other tokens have what they would have in a batch without it, of the same capacity."""
    top_k = SPECS[name].num_experts_per_tok
    gate, hidden_TH = build(name), batch()
    limit = None if max_nodes is None else NodeLimit(np.eye(4, dtype=bool)[np.arange(EXPERTS) // 4], max_nodes)
    capacity = max(1, TOKENS * top_k // EXPERTS)

    def capped(num_tokens: int) -> CapacityGate:
        return CapacityGate(gate, EXPERTS, (capacity - 0.5) * EXPERTS / (num_tokens * top_k), overflow)

    # First of all: whoever takes a place takes it before the others.
    hidden_TH[0, 7] = float("nan")
    with_it, without = capped(TOKENS), capped(TOKENS - 1)
    chosen, expected = with_it(hidden_TH, limit), without(hidden_TH[1:], limit)
    check_own_row(chosen, 0, top_k)
    assert torch.equal(chosen.expert_ids_TK[1:], expected.expert_ids_TK)
    assert torch.equal(chosen.weights_TK[1:], expected.weights_TK)
    assert (with_it.dropped, with_it.rerouted) == (without.dropped, without.rerouted)
    assert with_it.dropped + with_it.rerouted > 0
