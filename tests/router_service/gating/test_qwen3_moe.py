import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from router_service.gating.build import build_gate
from router_service.gating.config import gate_spec_from_config


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 700])
def test_equals_transformers(num_tokens, norm_topk_prob, assert_same_routing):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=48, num_experts=128, num_experts_per_tok=8, norm_topk_prob=norm_topk_prob)
    router = Qwen3MoeTopKRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    hidden_TH = torch.randn(num_tokens, 48)
    _, weights_TK, ids_TK = router(hidden_TH)
    gate = build_gate(gate_spec_from_config(config.to_dict()), router.weight.detach(), None)
    assert_same_routing(gate(hidden_TH), ids_TK, weights_TK)
