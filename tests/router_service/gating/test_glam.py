import math

import torch

from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec


def paper(logits):
    """g1 / (g1 + g2) and g2 / (g1 + g2) of the softmax: GShard, algorithm 1, lines 7 to 9."""
    probabilities = [math.exp(x) for x in logits]
    first, second = sorted(range(len(logits)), key=lambda e: -logits[e])[:2]
    both = probabilities[first] + probabilities[second]
    return {first: probabilities[first] / both, second: probabilities[second] / both}


def test_equals_the_formula_in_float64():
    torch.manual_seed(0)
    weight_EH, hidden_TH = torch.randn(8, 16), torch.randn(100, 16)
    gate = build_gate(GateSpec(system="glam", num_experts=8, num_experts_per_tok=2), weight_EH, None)
    out = gate(hidden_TH)
    for ids, weights, logits in zip(
        out.expert_ids_TK.tolist(),
        out.weights_TK.tolist(),
        (hidden_TH.double() @ weight_EH.double().T).tolist(),
        strict=True,
    ):
        expected = paper(logits)
        assert set(ids) == set(expected)
        assert all(abs(weight - expected[expert]) < 1e-5 for expert, weight in zip(ids, weights, strict=True))


def test_equals_tensor2tensors_without_a_capacity(tensor2tensor_top_2, by_expert):
    torch.manual_seed(0)
    weight_EH, hidden_TH = torch.randn(8, 16), torch.randn(96, 16)
    gate = build_gate(GateSpec(system="glam", num_experts=8, num_experts_per_tok=2), weight_EH, None)
    expected_TE = tensor2tensor_top_2(weight_EH, hidden_TH, 8.0)
    torch.testing.assert_close(by_expert(gate(hidden_TH), 8), expected_TE, atol=1e-6, rtol=0)
