"""Parameter counts by part, computed from the architecture."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.planner.architecture import Architecture


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCounts:
    """How many weights each part holds, over all layers.

    `active` is what one token uses: everything but the routed experts that its gate did not choose. The input
    embedding is one row a token; publishers disagree on counting its table, so both counts are given.
    """

    input_embedding: int
    output_head: int
    attention: int
    norms: int
    dense_mlp: int
    shared_experts: int
    gates: int
    routed_experts: int
    active_routed_experts: int
    embedding_is_active: bool

    @property
    def engine(self) -> int:
        """What an engine holds: everything that is not a routed expert."""
        return self.total - self.routed_experts

    @property
    def total(self) -> int:
        parts = (self.input_embedding, self.output_head, self.attention, self.norms, self.dense_mlp)
        return sum(parts) + self.shared_experts + self.gates + self.routed_experts

    @property
    def active_with_embedding(self) -> int:
        return self.engine + self.active_routed_experts

    @property
    def active(self) -> int:
        """Active parameters as the model's publisher counts them."""
        return self.active_with_embedding - (0 if self.embedding_is_active else self.input_embedding)


def count_parameters(architecture: Architecture) -> ParameterCounts:
    """Weights by part. A tied output head is counted once, as the input embedding; multi-token-prediction
    layers of a checkpoint are not counted, nor loaded."""
    a = architecture
    table = a.vocab_size * a.hidden_size
    attention_blocks = a.num_layers + a.num_cross_attention
    dense_layers = a.num_layers - a.num_moe_layers
    routed = a.num_moe_layers * a.expert_parameters
    stacks = 2 if a.num_cross_attention else 1
    return ParameterCounts(
        input_embedding=table,
        output_head=0 if a.tied_embeddings else table,
        attention=attention_blocks * a.attention.parameters(a.hidden_size),
        norms=(attention_blocks + a.num_layers + stacks) * a.hidden_size,
        dense_mlp=dense_layers * (3 if a.dense_gated else 2) * a.hidden_size * a.dense_intermediate,
        shared_experts=a.num_moe_layers * a.hidden_size * (3 * a.shared_intermediate + (1 if a.shared_gate else 0)),
        gates=a.num_moe_layers * a.hidden_size * a.num_experts,
        routed_experts=routed * a.num_experts,
        active_routed_experts=routed * a.experts_per_token,
        embedding_is_active=a.counts_embedding or a.tied_embeddings,
    )
