"""What the planner needs to know of a model. Frozen data and the parameter counts that follow from it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedQueryAttention:
    """Multi-head, grouped-query (Ainslie et al. 2023) and multi-query attention: caches keys and values.

    bias:    query, key, value and output projections each have a bias
    qk_norm: queries and keys are normalised per head
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    bias: bool = False
    qk_norm: bool = False

    def parameters(self, hidden_size: int) -> int:
        """Weights of one layer's attention."""
        query, key_value = self.num_heads * self.head_dim, 2 * self.num_key_value_heads * self.head_dim
        weights = hidden_size * (2 * query + key_value)
        biases = query + key_value + hidden_size if self.bias else 0
        return weights + biases + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def cache_width(self) -> int:
        """Numbers cached for each token and layer."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def score_width(self) -> int:
        """Multiply-adds per cached token and query token: scores and the weighted sum of values."""
        return 2 * self.num_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-head latent attention, DeepSeek-V2 (arXiv:2405.04434) section 2.1: caches a latent."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def parameters(self, hidden_size: int) -> int:
        """Weights of one layer's attention, the norms of both latents included."""
        query_width = self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        if self.q_lora_rank is None:
            query = hidden_size * query_width
        else:
            query = self.q_lora_rank * (hidden_size + query_width + 1)
        latent = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        key_value = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + latent + key_value + self.num_heads * self.v_head_dim * hidden_size

    @property
    def cache_width(self) -> int:
        """Numbers cached for each token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def score_width(self) -> int:
        """Multiply-adds per cached token and query token, with the up-projections absorbed into the query."""
        return self.num_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """A decoder, or an encoder and a decoder, some of whose feed-forward blocks are Mixture-of-Experts.

    num_layers:          all layers, of encoder and decoder together
    num_cross_attention: decoder layers that also attend to an encoder
    dense_intermediate:  width of the feed-forward block where a layer is not MoE
    shared_intermediate: width of all shared experts of a layer together, 0 for none
    num_groups:          native gate groups (`n_group`); a token may use `topk_group` of them
    dtype_bytes:         bytes of one weight outside the experts, and of one cached number
    checkpoint_scheme:   how the checkpoint holds its expert weights, a name of `precision.SCHEMES`
    counts_embedding:    the publisher counts the input embedding among active parameters
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    num_layers: int
    num_cross_attention: int
    num_moe_layers: int
    attention: GroupedQueryAttention | LatentAttention
    dense_intermediate: int
    dense_gated: bool
    num_experts: int
    experts_per_token: int
    expert_intermediate: int
    expert_gated: bool
    expert_bias: bool
    shared_intermediate: int
    shared_gate: bool
    num_groups: int
    topk_group: int
    max_position_embeddings: int | None
    dtype_bytes: int
    checkpoint_scheme: str
    counts_embedding: bool

    @property
    def expert_matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of one expert's weight matrices."""
        up = (2 if self.expert_gated else 1) * self.expert_intermediate
        return ((up, self.hidden_size), (self.hidden_size, self.expert_intermediate))

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert of one layer."""
        biases = sum(rows for rows, _ in self.expert_matrices) if self.expert_bias else 0
        return sum(rows * columns for rows, columns in self.expert_matrices) + biases

    @property
    def cache_layers(self) -> int:
        """Layers whose keys and values stay cached while a sequence is decoded."""
        return self.num_layers if self.num_cross_attention == 0 else 2 * self.num_cross_attention
