"""Reads a Hugging Face config.json, as plain JSON, into an Architecture.

Keys are those of the families' own configs. Models that never had one (GShard, GLaM, the GPT-4 rumour) are
written with the same keys, and with two of ours where the papers need them:

  gated_experts, gated_mlp   whether experts, and the feed-forward blocks of other layers, have a gate matrix
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.planner.architecture import Architecture, GroupedQueryAttention, LatentAttention
from experts.errors import ConfigError

Config = Mapping[str, Any]

_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_LARGEST = 10_000_000
_MOST_LAYERS = 10_000
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_QK_NORM = {"qwen3_moe", "glm4_moe"}
_EXPERT_BIAS = {"gpt_oss"}
# The published active counts of these leave the input embedding's table out, everyone else's have it.
_EMBEDDING_NOT_ACTIVE = ("deepseek_v2", "deepseek_v3", "kimi")


def read_architecture(config: Config, source: str) -> Architecture:
    """The architecture that `config` describes. `source` names the file in messages.

    Raises ConfigError: a key is missing, of the wrong type or impossible, or the model has no experts.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {
            **text,
            "quantization_config": config.get("quantization_config", text.get("quantization_config")),
        }
    keys = _Keys(config, source)
    experts = keys.first(_EXPERTS)
    _check_attention(keys)
    if not experts or experts < 2:
        raise ConfigError(
            f"{source}: none of {', '.join(_EXPERTS)} is at least 2, so the model has no routed experts; "
            "the planner is for Mixture-of-Experts models"
        )
    architecture = _encoder_decoder(keys, experts) if "d_model" in config else _decoder(keys, experts)
    if architecture.experts_per_token > experts:
        raise ConfigError(
            f"{source}: num_experts_per_tok is {architecture.experts_per_token} of {experts} experts; "
            f"set it to {experts} or less"
        )
    if experts % architecture.num_groups or architecture.topk_group > architecture.num_groups:
        raise ConfigError(
            f"{source}: n_group {architecture.num_groups} must divide {experts} experts and be at least topk_group"
        )
    return architecture


class _Keys:
    """Typed look-ups whose errors name file and key."""

    def __init__(self, config: Config, source: str) -> None:
        self.config, self.source = config, source

    def optional(self, key: str) -> int | None:
        value = self.config.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _LARGEST:
            raise ConfigError(f"{self.source}: {key} is {value!r}, a whole number from 0 to {_LARGEST} is needed")
        return value

    def first(self, names: tuple[str, ...]) -> int | None:
        return next((value for key in names if (value := self.optional(key)) is not None), None)

    def required(self, *names: str) -> int:
        value = self.first(names)
        if not value:
            raise ConfigError(f"{self.source}: {' or '.join(names)} is missing; add it as the model's card states it")
        return value

    def listing(self, key: str) -> list[Any]:
        value = self.config.get(key) or []
        if not isinstance(value, list):
            raise ConfigError(f"{self.source}: {key} is {value!r}, a list is needed")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.source}: {key} is {value!r}, true or false is needed")
        return value


def _check_attention(keys: _Keys) -> None:
    """Refuses layers that are neither attention nor MoE: counting them as attention would be silently wrong."""
    kinds = set(map(str, keys.listing("layer_types"))) - {"full_attention", "sliding_attention", "chunked_attention"}
    if kinds or "attn_layer_period" in keys.config:
        named = ", ".join(sorted(kinds)) or "state-space layers"
        raise ConfigError(f"{keys.source}: layer_types has {named}; the planner knows softmax attention only")


def _decoder(keys: _Keys, experts: int) -> Architecture:
    config, model_type = keys.config, str(keys.config.get("model_type", ""))
    layers = keys.required("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise ConfigError(f"{keys.source}: num_hidden_layers is {layers}; at most {_MOST_LAYERS} are planned for")
    intermediate = keys.first(("moe_intermediate_size",)) or keys.required("intermediate_size")
    shared = keys.optional("shared_expert_intermediate_size")
    return Architecture(
        model_type=model_type,
        hidden_size=keys.required("hidden_size"),
        vocab_size=keys.required("vocab_size"),
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        num_layers=layers,
        num_cross_attention=0,
        num_moe_layers=sum(_is_moe_layer(keys, layer) for layer in range(layers)),
        attention=_attention(keys, model_type),
        dense_intermediate=keys.first(("intermediate_size",)) or intermediate,
        dense_gated=keys.flag("gated_mlp", True),
        num_experts=experts,
        experts_per_token=keys.required(*_EXPERTS_PER_TOKEN),
        expert_intermediate=intermediate,
        expert_gated=keys.flag("gated_experts", True),
        expert_bias=model_type in _EXPERT_BIAS,
        shared_intermediate=(keys.first(_SHARED_EXPERTS) or 0) * intermediate if shared is None else shared,
        shared_gate=shared is not None,
        num_groups=keys.optional("n_group") or 1,
        topk_group=keys.optional("topk_group") or 1,
        max_position_embeddings=keys.optional("max_position_embeddings"),
        dtype_bytes=_dtype_bytes(keys),
        checkpoint_scheme=_checkpoint_scheme(config, keys.source),
        counts_embedding=not model_type.startswith(_EMBEDDING_NOT_ACTIVE),
    )


def _encoder_decoder(keys: _Keys, experts: int) -> Architecture:
    """T5's keys, as Switch Transformers use them (transformers `SwitchTransformersConfig`)."""
    hidden, heads = keys.required("d_model"), keys.required("num_heads")
    encoder = keys.required("num_layers")
    decoder = keys.first(("num_decoder_layers",)) or encoder
    sparse = (keys.optional("num_sparse_encoder_layers") or 0) + (keys.optional("num_sparse_decoder_layers") or 0)
    gated = keys.flag("is_gated_act", False)
    return Architecture(
        model_type=str(keys.config.get("model_type", "")),
        hidden_size=hidden,
        vocab_size=keys.required("vocab_size"),
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        num_layers=encoder + decoder,
        num_cross_attention=decoder,
        num_moe_layers=sparse,
        attention=GroupedQueryAttention(
            num_heads=heads, num_key_value_heads=heads, head_dim=keys.first(("d_kv",)) or hidden // heads
        ),
        dense_intermediate=keys.required("d_ff"),
        dense_gated=gated,
        num_experts=experts,
        experts_per_token=keys.first(_EXPERTS_PER_TOKEN) or 1,
        expert_intermediate=keys.required("d_ff"),
        expert_gated=gated,
        expert_bias=False,
        shared_intermediate=0,
        shared_gate=False,
        num_groups=1,
        topk_group=1,
        max_position_embeddings=keys.optional("n_positions"),
        dtype_bytes=_dtype_bytes(keys),
        checkpoint_scheme=_checkpoint_scheme(keys.config, keys.source),
        counts_embedding=True,
    )


def _attention(keys: _Keys, model_type: str) -> GroupedQueryAttention | LatentAttention:
    heads = keys.required("num_attention_heads")
    latent = keys.optional("kv_lora_rank")
    if latent:
        return LatentAttention(
            num_heads=heads,
            q_lora_rank=keys.optional("q_lora_rank") or None,
            kv_lora_rank=latent,
            qk_nope_head_dim=keys.required("qk_nope_head_dim"),
            qk_rope_head_dim=keys.required("qk_rope_head_dim"),
            v_head_dim=keys.required("v_head_dim"),
        )
    hidden = keys.required("hidden_size")
    head_dim = keys.first(("head_dim",))
    if not head_dim and hidden % heads:
        raise ConfigError(f"{keys.source}: hidden_size {hidden} is no multiple of {heads} heads; state head_dim")
    return GroupedQueryAttention(
        num_heads=heads,
        num_key_value_heads=keys.first(("num_key_value_heads",)) or heads,
        head_dim=head_dim or hidden // heads,
        bias=keys.flag("attention_bias", False),
        qk_norm=keys.flag("use_qk_norm", model_type in _QK_NORM),
    )


def _is_moe_layer(keys: _Keys, layer: int) -> bool:
    if kinds := keys.listing("mlp_layer_types"):
        return layer < len(kinds) and kinds[layer] == "sparse"
    if layer in keys.listing("mlp_only_layers"):
        return False
    step = keys.optional("decoder_sparse_step") or keys.optional("moe_layer_interval") or 1
    if isinstance(keys.config.get("moe_layer_freq"), list):
        frequencies = keys.listing("moe_layer_freq")
        return layer < len(frequencies) and bool(frequencies[layer])
    frequency = keys.optional("moe_layer_freq") or 1
    dense_first = keys.first(("first_k_dense_replace", "moe_layer_start_index")) or 0
    return layer >= dense_first and layer % frequency == 0 and (layer + 1) % step == 0


def _dtype_bytes(keys: _Keys) -> int:
    dtype = str(keys.config.get("torch_dtype") or keys.config.get("dtype") or "bfloat16")
    if dtype not in _DTYPE_BYTES:
        raise ConfigError(f"{keys.source}: torch_dtype is {dtype!r}; use one of {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[dtype]


def _checkpoint_scheme(config: Config, source: str) -> str:
    section = config.get("quantization_config")
    if not isinstance(section, Mapping):
        return "none"
    method = str(section.get("quant_method"))
    if method != "fp8":
        raise ConfigError(
            f"{source}: quantization_config.quant_method is {method!r}, which expert groups cannot read; "
            "take the bf16 or block-fp8 checkpoint and choose --quantization"
        )
    return "fp8"
