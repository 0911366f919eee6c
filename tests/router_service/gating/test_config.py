import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen3MoeConfig

from experts.errors import CheckpointError
from router_service.gating.build import build_gate
from router_service.gating.config import gate_spec_from_config


@pytest.mark.parametrize(
    ("config", "system", "num_experts"),
    [
        (MixtralConfig(num_local_experts=6), "mixtral", 6),
        (Qwen3MoeConfig(num_experts=12), "qwen3_moe", 12),
        (DeepseekV2Config(n_routed_experts=10, num_experts_per_tok=6), "deepseek_v2", 10),
        (DeepseekV3Config(n_routed_experts=32), "deepseek_v3", 32),
    ],
)
def test_reads_what_transformers_writes(config, system, num_experts):
    spec = gate_spec_from_config(config.to_dict())
    assert (spec.system, spec.num_experts) == (system, num_experts)


def test_kimi_k2_is_deepseek_v3_with_one_group_of_384():
    spec = gate_spec_from_config(
        {
            "model_type": "kimi_k2", "n_routed_experts": 384, "num_experts_per_tok": 8, "n_group": 1,
            "topk_group": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
        "routed_scaling_factor": 2.827, }
    )  # fmt: skip
    assert (spec.system, spec.num_experts, spec.n_group, spec.routed_scaling_factor) == (
        "deepseek_v3",
        384,
        1,
        2.827,
    )


def test_unknown_family_is_none():
    assert gate_spec_from_config({"model_type": "gpt_oss"}) is None
    assert gate_spec_from_config({}) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_routed_experts": None, "num_local_experts": None}, "n_routed_experts"),
        ({"n_group": 5}, "n_group"),
        ({"topk_group": 9}, "topk_group"),
        ({"topk_group": 1, "num_experts_per_tok": 40}, "topk_group"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
        ({"scoring_func": "softmax"}, "scoring_func"),
    ],
)
def test_a_bad_config_names_the_key(change, named):
    config = DeepseekV3Config().to_dict() | change
    with pytest.raises(CheckpointError, match=named):
        gate_spec_from_config(config)


def test_a_gate_of_the_wrong_shape_is_refused():
    spec = gate_spec_from_config(DeepseekV3Config(n_routed_experts=32).to_dict())
    with pytest.raises(CheckpointError, match=r"\[32, hidden_size\]"):
        build_gate(spec, torch.zeros(31, 8), torch.zeros(32))
    with pytest.raises(CheckpointError, match=r"expected \[32\]"):
        build_gate(spec, torch.zeros(32, 8), torch.zeros(31))
    with pytest.raises(CheckpointError, match="e_score_correction_bias"):
        build_gate(spec, torch.zeros(32, 8), None)
