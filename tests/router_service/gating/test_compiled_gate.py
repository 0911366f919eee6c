"""Compiled gates against the operators of the same gate (which are checked against transformers)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from experts.errors import RequestError
from router_service.gating.build import build_gate
from router_service.gating.compiled_gate import CompiledGate
from router_service.gating.gate import GateSpec

HIDDEN = 48
SPECS = {
    "mixtral": GateSpec(system="mixtral", num_experts=8, num_experts_per_tok=2),
    "qwen3": GateSpec(system="qwen3_moe", num_experts=20, num_experts_per_tok=4),
    "qwen3, normalised": GateSpec(system="qwen3_moe", num_experts=20, num_experts_per_tok=4, norm_topk_prob=True),
    "v2, greedy": GateSpec(system="deepseek_v2", num_experts=24, num_experts_per_tok=6, routed_scaling_factor=16.0),
    "v2": GateSpec(system="deepseek_v2", num_experts=24, num_experts_per_tok=6, n_group=8, topk_group=3),
    "v3": GateSpec(
        system="deepseek_v3",
        num_experts=32,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        n_group=8,
        topk_group=4,
    ),
    "kimi_k2": GateSpec(system="deepseek_v3", num_experts=40, num_experts_per_tok=8, n_group=1, topk_group=1),
}


def build(name: str) -> CompiledGate:
    spec = SPECS[name]
    generator = torch.Generator().manual_seed(1)
    bias_E = torch.randn(spec.num_experts, generator=generator) * 0.2 if spec.system == "deepseek_v3" else None
    weight_EH = torch.randn(spec.num_experts, HIDDEN, generator=generator) * 0.3
    gate = build_gate(spec, torch.nn.Parameter(weight_EH), None if bias_E is None else torch.nn.Parameter(bias_E))
    assert isinstance(gate, CompiledGate)
    return gate


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 300])
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_operators(name: str, num_tokens: int, assert_same_routing) -> None:
    gate = build(name)
    hidden_TH = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(num_tokens))
    with torch.no_grad():
        expected = gate.gate(hidden_TH)
    chosen = gate(hidden_TH)
    assert (chosen.expert_ids_TK.dtype, chosen.weights_TK.dtype) == (torch.int64, torch.float32)
    assert_same_routing(chosen, expected.expert_ids_TK, expected.weights_TK)
    # Rows that do not lie beside each other.
    apart_TH = torch.randn(num_tokens, 2 * HIDDEN)[:, ::2].copy_(hidden_TH)
    assert torch.equal(gate(apart_TH).expert_ids_TK, chosen.expert_ids_TK)


@pytest.mark.parametrize("name", SPECS)
def test_equals_go_to_the_lower_number(name: str) -> None:
    spec = SPECS[name]
    bias_E = torch.zeros(spec.num_experts) if spec.system == "deepseek_v3" else None
    gate = build_gate(spec, torch.zeros(spec.num_experts, HIDDEN), bias_E)
    assert gate(torch.randn(2, HIDDEN)).expert_ids_TK.tolist() == [list(range(spec.num_experts_per_tok))] * 2


def test_what_is_not_float32_or_large_beside_threads_goes_to_the_operators() -> None:
    gate = build("v3")
    called = []
    operators, gate.gate = gate.gate, lambda hidden_TH, limit=None: called.append(limit) or operators(hidden_TH, limit)
    hidden_TH = torch.randn(65, HIDDEN)
    gate(hidden_TH)
    assert not called
    torch.set_num_threads(3)
    gate(hidden_TH)
    gate(hidden_TH[:3].bfloat16())

    def limit(choice_TE: torch.Tensor, top_k: int) -> torch.Tensor:
        return choice_TE

    gate(hidden_TH[:3], limit)
    assert called == [None, None, limit]
    with pytest.raises(RequestError, match="47 wide, the gate takes 48"):
        gate(hidden_TH[:3, :47])
