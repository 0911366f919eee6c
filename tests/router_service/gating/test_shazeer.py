import math

import torch

from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec
from router_service.gating.shazeer import ShazeerGate


def paper(logits):
    """softmax(KeepTopK(H(x), k)), equations 3 and 5 with the noise at zero."""
    best = sorted(range(len(logits)), key=lambda e: -logits[e])[:2]
    total = math.fsum(math.exp(logits[e]) for e in best)
    return {e: math.exp(logits[e]) / total for e in best}


def test_equals_the_formula_in_float64():
    torch.manual_seed(0)
    weight_EH, hidden_TH = torch.randn(8, 16), torch.randn(100, 16)
    gate = build_gate(GateSpec(system="shazeer", num_experts=8, num_experts_per_tok=2), weight_EH, None)
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


def test_noise_is_what_equation_4_says_and_comes_from_the_generator():
    torch.manual_seed(0)
    weight_EH, noise_EH, hidden_TH = torch.randn(8, 16), torch.randn(8, 16), torch.randn(50, 16)
    spec = GateSpec(system="shazeer", num_experts=8, num_experts_per_tok=2)
    out = ShazeerGate(spec, weight_EH, noise_EH, torch.Generator().manual_seed(3))(hidden_TH)
    normal_TE = torch.randn(50, 8, generator=torch.Generator().manual_seed(3)).double()
    spread_TE = torch.log1p(torch.exp(hidden_TH.double() @ noise_EH.double().T))
    noisy_TE = hidden_TH.double() @ weight_EH.double().T + normal_TE * spread_TE
    for ids, weights, logits in zip(
        out.expert_ids_TK.tolist(), out.weights_TK.tolist(), noisy_TE.tolist(), strict=True
    ):
        expected = paper(logits)
        assert set(ids) == set(expected)
        assert all(abs(weight - expected[expert]) < 1e-5 for expert, weight in zip(ids, weights, strict=True))
