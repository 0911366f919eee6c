import torch
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

from router_service.gating.build import build_gate
from router_service.gating.gate import GateSpec


def test_equals_transformers(assert_same_routing):
    torch.manual_seed(0)
    config = DeepseekV4Config(hidden_size=64, n_routed_experts=64, num_experts_per_tok=6, routed_scaling_factor=1.5)
    router = DeepseekV4TopKRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    torch.nn.init.normal_(router.e_score_correction_bias, std=0.2)
    hidden_TH = torch.randn(300, 64)
    _, weights_TK, ids_TK = router(hidden_TH)
    spec = GateSpec(
        system="deepseek_v4",
        num_experts=router.num_experts,
        num_experts_per_tok=router.top_k,
        routed_scaling_factor=router.routed_scaling_factor,
    )
    gate = build_gate(spec, router.weight.detach(), router.e_score_correction_bias)
    assert_same_routing(gate(hidden_TH), ids_TK, weights_TK)
