import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from router_service.gating.build import build_gate
from router_service.gating.config import gate_spec_from_config


@pytest.mark.parametrize(
    ("num_experts", "n_group", "topk_group"),
    [(256, 8, 4), (16, 4, 2), (384, 1, 1)],
    ids=["v3", "demo", "kimi_k2"],
)
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 700])
def test_equals_transformers(num_tokens, norm_topk_prob, num_experts, n_group, topk_group, assert_same_routing):
    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=48,
        n_routed_experts=num_experts,
        num_experts_per_tok=8,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.2)
    hidden_TH = torch.randn(num_tokens, 48)
    _, weights_TK, ids_TK = router(hidden_TH)
    gate = build_gate(gate_spec_from_config(config.to_dict()), router.weight.detach(), router.e_score_correction_bias)
    assert_same_routing(gate(hidden_TH), ids_TK, weights_TK)
