import pytest
import torch
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

from experts.errors import CheckpointError
from router_service.gating.build import build_gate
from router_service.gating.config import gate_spec_from_config


@pytest.mark.parametrize(
    ("topk_method", "n_group", "topk_group"),
    [("greedy", None, None), ("group_limited_greedy", 8, 3), ("group_limited_greedy", 1, 1)],
)
@pytest.mark.parametrize("num_tokens", [1, 700])
def test_equals_transformers(num_tokens, topk_method, n_group, topk_group, assert_same_routing):
    torch.manual_seed(0)
    config = DeepseekV2Config(
        hidden_size=64,
        n_routed_experts=160,
        num_experts_per_tok=6,
        topk_method=topk_method,
        n_group=n_group,
        topk_group=topk_group,
        routed_scaling_factor=16.0,
    )
    router = DeepseekV2TopkRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    hidden_TH = torch.randn(num_tokens, 64)
    _, weights_TK, ids_TK = router(hidden_TH)
    gate = build_gate(gate_spec_from_config(config.to_dict()), router.weight.detach(), None)
    assert_same_routing(gate(hidden_TH), ids_TK, weights_TK)


def test_unknown_topk_method_is_an_error():
    with pytest.raises(CheckpointError, match="topk_method"):
        gate_spec_from_config(DeepseekV2Config().to_dict() | {"topk_method": "noaux_tc"})
