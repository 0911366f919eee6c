import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from router_service.gating.build import build_gate
from router_service.gating.config import gate_spec_from_config


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 8), (700, 8), (300, 64)])
def test_equals_transformers(num_tokens, num_experts, assert_same_routing):
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=48, num_local_experts=num_experts, num_experts_per_tok=2)
    router = MixtralTopKRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    hidden_TH = torch.randn(num_tokens, 48)
    _, weights_TK, ids_TK = router(hidden_TH)
    gate = build_gate(gate_spec_from_config(config.to_dict()), router.weight.detach(), None)
    assert_same_routing(gate(hidden_TH), ids_TK, weights_TK)


def test_bfloat16_hidden_is_scored_in_float32():
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=48, num_local_experts=8)
    weight_EH = torch.randn(8, 48)
    gate = build_gate(gate_spec_from_config(config.to_dict()), weight_EH, None)
    hidden_TH = torch.randn(100, 48).bfloat16()
    out = gate(hidden_TH)
    logits_TE = hidden_TH.double() @ weight_EH.double().T
    assert torch.equal(out.expert_ids_TK, logits_TE.topk(2).indices)
    torch.testing.assert_close(out.weights_TK.double(), logits_TE.topk(2).values.softmax(-1), atol=1e-5, rtol=1e-5)
