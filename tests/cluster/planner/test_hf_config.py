from __future__ import annotations

from typing import Any

import pytest

from cluster.planner.architecture import GroupedQueryAttention, LatentAttention
from cluster.planner.hf_config import read_architecture
from cluster.planner.models import preset_config
from experts.errors import ConfigError


def config(name: str = "mixtral-8x7b", **changes: Any) -> dict[str, Any]:
    return {**preset_config(name), **changes}


def test_grouped_query_and_latent_attention_are_told_apart() -> None:
    assert isinstance(read_architecture(config(), "m").attention, GroupedQueryAttention)
    assert isinstance(read_architecture(config("deepseek-v3"), "m").attention, LatentAttention)
    without_q_lora = read_architecture(config("deepseek-v3", q_lora_rank=None), "m").attention
    assert isinstance(without_q_lora, LatentAttention)
    assert without_q_lora.q_lora_rank is None


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [
        ({}, 32),
        ({"first_k_dense_replace": 3}, 29),
        ({"decoder_sparse_step": 2}, 16),
        ({"moe_layer_freq": 2}, 16),
        ({"moe_layer_freq": [0] * 30 + [1] * 2}, 2),
        ({"mlp_only_layers": [0, 5]}, 30),
        ({"mlp_layer_types": ["dense"] + ["sparse"] * 31}, 31),
    ],
)
def test_which_layers_are_moe(changes: dict[str, Any], moe_layers: int) -> None:
    assert read_architecture(config(**changes), "m").num_moe_layers == moe_layers


def test_the_text_part_of_a_multimodal_config_is_read() -> None:
    inner = config("kimi-k2")
    assert read_architecture({"model_type": "kimi_vl", "text_config": inner}, "m") == read_architecture(inner, "m")


def test_an_fp8_checkpoint_is_seen() -> None:
    assert read_architecture(config("deepseek-v3"), "m").checkpoint_scheme == "fp8"
    assert read_architecture(config(), "m").checkpoint_scheme == "none"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": None}, "no routed experts"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers is"),
        ({"num_hidden_layers": 10**6}, "at most 10000"),
        ({"layer_types": 5}, "layer_types is 5"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers is '0'"),
        ({"moe_layer_freq": "x"}, "moe_layer_freq is 'x'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"num_experts_per_tok": 9}, "9 of 8 experts"),
        ({"num_attention_heads": 33}, "state head_dim"),
        ({"n_group": 3}, "n_group 3 must divide"),
        ({"n_group": 2, "topk_group": 3}, "topk_group"),
        ({"torch_dtype": "int3"}, "torch_dtype is 'int3'"),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ({"layer_types": ["linear_attention"] * 32}, "linear_attention"),
        ({"attn_layer_period": 8}, "state-space"),
    ],
)
def test_a_config_that_cannot_be_planned_names_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^here/config\.json: ") as raised:
        read_architecture(config(**changes), "here/config.json")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
