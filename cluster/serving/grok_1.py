"""Grok-1, which transformers does not have: Mixtral's modules where Grok-1 does the same, its own where it does not.

Formulas: github.com/xai-org/grok-1, model.py. Names of tensors and config keys: the checkpoints of that model for
transformers (hpcai-tech/grok-1), whose own code is not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralForCausalLM,
    MixtralModel,
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
    apply_rotary_pos_emb,
)


class Grok1Config(MixtralConfig):  # type: ignore[misc]
    """Defaults are the published model's.

    attn_output_multiplier:     of attention logits, in the place of 1 / sqrt(head size)
    max_attn_value:             c of `c * tanh(logits / c)`
    embedding_multiplier_scale: of the embeddings
    output_multiplier_scale:    of the logits
    """

    model_type = "grok-1"
    default_theta = 10000.0

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    hidden_act: str = "gelu_pytorch_tanh"  # jax.nn.gelu's default
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    attn_output_multiplier: float = 0.08838834764831845
    max_attn_value: float = 30.0
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257


class Grok1RMSNorm(nn.Module):
    """`scale * x / rms(x)`, all of it in float32."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self._eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] to the same."""
        normed = F.rms_norm(hidden.float(), (hidden.shape[-1],), self.scale.float(), self._eps)
        return normed.to(hidden.dtype)


class Grok1Embedding(nn.Embedding):
    """Rows times the config's multiplier; the output projection shares the rows without it."""

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self._multiplier: float = config.embedding_multiplier_scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self._multiplier


class Grok1TopKRouter(MixtralTopKRouter):  # type: ignore[misc]
    """Softmax over all experts, then the top K, not renormalised."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(logits, weights, expert ids) of hidden_states [T, H]."""
        logits_TE = F.linear(hidden_states.float(), self.weight.float())
        weights_TK, expert_ids_TK = logits_TE.softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits_TE, weights_TK, expert_ids_TK


class Grok1Attention(MixtralAttention):  # type: ignore[misc]
    """Logits are scaled by the config's multiplier, then capped; Gemma 2's eager function knows the cap as well."""

    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.scaling = config.attn_output_multiplier
        self._softcap: float = config.max_attn_value

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [B, T, H] to the same, and what the attention function returns beside."""
        shape = hidden_states.shape[:-1]
        query, key, value = (
            project(hidden_states).view(*shape, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, softcap=self._softcap, **kwargs
        )
        return self.o_proj(out.reshape(*shape, -1)), weights


class Grok1DecoderLayer(nn.Module):
    """Norms before and after attention, before and after the experts; what follows a norm is added."""

    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__()
        self.attn = Grok1Attention(config, layer_idx)
        self.moe_block = MixtralSparseMoeBlock(config)
        self.moe_block.gate = Grok1TopKRouter(config)
        self.pre_attn_norm, self.post_attn_norm, self.pre_moe_norm, self.post_moe_norm = (
            Grok1RMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(4)
        )

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        attended, _ = self.attn(self.pre_attn_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.post_attn_norm(attended)
        out: torch.Tensor = hidden_states + self.post_moe_norm(self.moe_block(self.pre_moe_norm(hidden_states)))
        return out


class Grok1Model(MixtralModel):  # type: ignore[misc]
    """Token ids to the last layer's normed hidden states."""

    config_class = Grok1Config
    _supports_sdpa = False  # it has no cap

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config)
        self.embed_tokens = Grok1Embedding(config)
        self.layers = nn.ModuleList(Grok1DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()


class Grok1ForCausalLM(MixtralForCausalLM):  # type: ignore[misc]
    """With the output projection, whose logits are multiplied by the config's scale."""

    config_class = Grok1Config
    _supports_sdpa = False  # it has no cap

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config)
        self.model = Grok1Model(config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As MixtralForCausalLM."""
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.config.output_multiplier_scale
        return output


def _register() -> None:
    AutoConfig.register("grok-1", Grok1Config)
    AutoModelForCausalLM.register(Grok1Config, Grok1ForCausalLM)
    up = WeightConverter(
        source_patterns=[".experts.*.linear.weight", ".experts.*.linear_v.weight"],
        target_patterns=".experts.gate_up_proj",
        operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
    )
    down = WeightConverter(
        source_patterns=".experts.*.linear_1.weight",
        target_patterns=".experts.down_proj",
        operations=[MergeModulelist(dim=0)],
    )
    register_checkpoint_conversion_mapping("grok-1", [up, down])


_register()
