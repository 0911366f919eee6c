import pytest
import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from router_service.gating.build import build_gate
from router_service.gating.capacity import CapacityGate
from router_service.gating.config import gate_spec_from_config


@pytest.mark.parametrize("expert_capacity", [1000, 20])
def test_equals_transformers_with_and_without_capacity(expert_capacity):
    torch.manual_seed(0)
    config = SwitchTransformersConfig(d_model=32, num_experts=8, expert_capacity=expert_capacity)
    router = SwitchTransformersTop1Router(config).eval()
    torch.nn.init.normal_(router.classifier.weight)
    hidden_TH = torch.randn(200, 32)
    one_hot, probability, _ = router(hidden_TH[None])
    gate = build_gate(gate_spec_from_config(config.to_dict()), router.classifier.weight.detach(), None)
    capped = CapacityGate(gate, 8, expert_capacity * 8 / 200, "drop")
    out = capped(hidden_TH)
    kept = one_hot[0].sum(-1) > 0
    assert torch.equal(out.expert_ids_TK[:, 0] >= 0, kept)
    assert torch.equal(out.expert_ids_TK[kept, 0], one_hot[0].argmax(-1)[kept])
    torch.testing.assert_close(out.weights_TK[kept], probability[0][kept], atol=1e-6, rtol=1e-6)
    assert out.weights_TK[~kept].eq(0).all()
    assert capped.dropped == int((~kept).sum())
    assert (capped.dropped > 0) == (expert_capacity == 20)
