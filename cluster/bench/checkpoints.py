"""Random checkpoints of a known shape for the serving benchmark, written by transformers and kept between runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from experts.errors import ConfigError

MAX_MODEL_LEN = 512


def _mixtral() -> Any:
    # The vocabulary keeps Mixtral 8x7B's ratio to the hidden size, so that the head costs its natural share.
    return MixtralConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=MAX_MODEL_LEN,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _deepseek_v3() -> Any:
    # kv_lora_rank and qk_rope_head_dim are the full-sized model's: vLLM's MLA knows no others.
    return DeepseekV3Config(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        n_routed_experts=64,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=MAX_MODEL_LEN,
        num_nextn_predict_layers=0,
        topk_method="noaux_tc",  # as in DeepSeek's own config.json; transformers does without, other readers don't
        scoring_func="sigmoid",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


PRESETS: dict[str, Callable[[], Any]] = {"mixtral": _mixtral, "deepseek-v3": _deepseek_v3}


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose every entry decodes to complete ASCII text, so that every token streams at once."""
    pieces = ["<s>", "</s>", *(chr(code) for code in range(33, 127)), "\u0120", "\u010a"]
    pieces += [f"\u0120t{index}" for index in range(vocab_size - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
        model_max_length=MAX_MODEL_LEN,
        clean_up_tokenization_spaces=False,
    )


def preset_checkpoint(name: str, cache: Path | None = None) -> Path:
    """Directory of preset `name`, written on first use.

    The weights are bfloat16 numbers, as those of nearly every published checkpoint, and have the scale of trained ones
    (0.05 rather than transformers' 0.02): gates then choose experts about as unevenly as real ones do.

    Raises ConfigError for a preset that does not exist.
    """
    if name not in PRESETS:
        raise ConfigError(f"checkpoint {name!r} is neither a directory nor a preset; presets: {', '.join(PRESETS)}")
    root = cache or Path(tempfile.gettempdir()) / f"expertmesh-bench-{os.getuid()}"
    directory = root / f"{name}-bfloat16"
    if (directory / "config.json").exists():
        return directory
    config = PRESETS[name]()
    config.initializer_range = 0.05
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16  # buffers, DeepSeek's bias for one, stay float32, as published
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=root))
    try:
        model.save_pretrained(partial)
        build_tokenizer(config.vocab_size).save_pretrained(partial)
        if not directory.exists():
            partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory
