"""Tiny random checkpoints, written by transformers itself, for whoever needs a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, chosen when Triton is first imported, which transformers does.
    os.environ["TRITON_INTERPRET"] = "1"

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import cluster.serving.grok_1  # noqa: F401  (registers with transformers)

SPECIAL_TOKENS = ["<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ 'assistant' if message.role == 'assistant' else 'user' }}|>"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BOS, EOS, VOCAB = 256, 257, 272

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_LATENT = {
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "routed_scaling_factor": 1.5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    },
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": _LATENT | {"n_group": 4, "topk_group": 2},
    "kimi_k2": _LATENT
    | {
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 8,
        "routed_scaling_factor": 2.827,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "qwen2_moe": {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    },
    "glm4_moe": {
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
    },
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "grok-1": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_output_multiplier": 0.7,
        "max_attn_value": 3.0,
        "embedding_multiplier_scale": 7.5,
        "output_multiplier_scale": 0.6,
        "tie_word_embeddings": True,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        "moe_intermediate_size": 32,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs beside it (`make test`): Ray on this machine once at a time, Ray on hosts of its own likewise."""
    for item in items:
        if "three_hosts" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("hosts"))
        elif item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> directory of a random float32 checkpoint with a byte-level tokenizer (token id = byte, see above)."""

    @cache
    def build(family: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        architecture = "deepseek_v3" if family == "kimi_k2" else family
        config = CONFIG_MAPPING[architecture](**{**_COMMON, **FAMILIES[family]})
        torch.manual_seed(sum(family.encode()))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name or "sinks" in name:  # zero at first, which would hide a bias that is ignored
                tensor.data.normal_(std=0.1)
            if name.endswith("norm.scale"):  # one at first, which would hide norms that are swapped
                tensor.data.uniform_(0.5, 1.5)
        model.save_pretrained(directory)
        if family != architecture:
            path = directory / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": family}))
        _byte_tokenizer().save_pretrained(directory)
        return directory

    return build


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's encoder.py)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]
