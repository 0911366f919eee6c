from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

from cluster.bench import checkpoints
from cluster.bench.checkpoints import PRESETS, build_tokenizer, preset_checkpoint
from experts.errors import ConfigError


def test_every_token_decodes_to_complete_text_of_its_own() -> None:
    tokenizer = build_tokenizer(512)
    assert len(tokenizer) == 512
    for token_id in range(2, 512):
        text = tokenizer.decode([token_id], skip_special_tokens=True)
        assert text
        assert text.isascii()


def test_presets_have_the_measured_shapes() -> None:
    mixtral, deepseek = PRESETS["mixtral"](), PRESETS["deepseek-v3"]()
    assert (mixtral.hidden_size, mixtral.intermediate_size, mixtral.num_hidden_layers) == (512, 1024, 8)
    assert (mixtral.num_local_experts, mixtral.num_experts_per_tok) == (8, 2)
    assert (deepseek.hidden_size, deepseek.moe_intermediate_size, deepseek.num_hidden_layers) == (512, 256, 8)
    assert (deepseek.n_routed_experts, deepseek.num_experts_per_tok) == (64, 8)
    assert (deepseek.kv_lora_rank, deepseek.qk_rope_head_dim) == (512, 64)


def test_a_preset_is_written_once_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiny() -> MixtralConfig:
        return MixtralConfig(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )

    monkeypatch.setitem(checkpoints.PRESETS, "tiny", tiny)
    directory = preset_checkpoint("tiny", tmp_path)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert preset_checkpoint("tiny", tmp_path) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-bfloat16"]
    assert AutoModelForCausalLM.from_pretrained(directory).dtype == torch.bfloat16
    assert (
        len(AutoTokenizer.from_pretrained(directory))
        == json.loads((directory / "config.json").read_text())["vocab_size"]
    )


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'mixtrel'.*mixtral"):
        preset_checkpoint("mixtrel")
