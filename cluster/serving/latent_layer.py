"""A layer with multi-head latent attention on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster.serving.compiled_layer import AtOnce, CompiledLayer, has_compiled_norms
from cluster.serving.kv_cache import Arena
from cluster.serving.packed_linear import PackedLinear, can_join, join_layers
from experts.ops.cpu_threads import ThreadTeam
from experts.ops.packed_matmul import pack_exactly

if TYPE_CHECKING:
    from cluster.serving._numba.norm_and_rope import Rope

# Families whose layers are exactly this; they differ in how they turn pairs.
_FAMILIES = {"DeepseekV2DecoderLayer", "DeepseekV3DecoderLayer"}


class LatentLayer(CompiledLayer):
    """See CompiledLayer, and `cluster.serving.latent_attention` for what is absorbed or expanded."""

    def __init__(self, layer: Any, team: ThreadTeam) -> None:
        # Loads LLVM, which a GPU's process does not need.
        from cluster.serving._numba import latent as compiled_latent
        from cluster.serving._numba.decode_layers import Attention
        from cluster.serving._numba.latent_parts import LatentShape
        from cluster.serving._numba.latent_prompt import compile_latent_prompt
        from experts.ops._numba.call import address_of

        attention = layer.self_attn
        heads, rank, rope_dim = attention.num_heads, attention.kv_lora_rank, attention.qk_rope_head_dim
        nope, value_dim = attention.qk_nope_head_dim, attention.v_head_dim
        compressed = attention.q_lora_rank is not None
        latent = attention.latent_projections
        into = join_layers(attention.q_a_proj if compressed else attention.q_proj, attention.kv_a_proj_with_mqa)
        queries, onto = attention.q_b_proj.matrix if compressed else into, attention.o_proj.matrix
        absorb = pack_exactly(latent.up_key_HNR.transpose(1, 2).reshape(-1, nope))
        expand = pack_exactly(latent.up_value_HRV.transpose(1, 2).reshape(-1, rank))
        pairs = attention.kv_b_proj.matrix
        matrices = [into, queries, absorb, expand, onto, pairs]
        # Each head's part of a matrix, panel by panel; `heads` times the whole where it has none.
        parts = [1, 1, heads, heads, 1, 1]
        panels = np.array([len(matrix.panels) // of for matrix, of in zip(matrices, parts, strict=True)])
        addresses = np.array([matrix.addresses() for matrix in matrices])[:, :, None].repeat(heads, axis=2)
        for number in (2, 3):
            addresses[number, 0] += np.arange(heads) * (matrices[number].nbytes // heads)
        norm = attention.kv_a_layernorm
        query_norm = attention.q_a_layernorm if compressed else norm
        shape = LatentShape(
            heads=heads,
            nope=nope,
            rope_dim=rope_dim,
            rank=rank,
            value_dim=value_dim,
            query_rank=attention.q_lora_rank or 0,
            rope=_rope(layer),
        )
        kinds = tuple(matrix.kind for matrix in matrices)
        work = (
            (into.num_columns,),
            (queries.num_columns if compressed else 0,),
            (heads * value_dim,),
            (onto.num_columns,),
        )
        compiled = compiled_latent.compile_latent(shape, kinds)
        super().__init__(
            layer,
            team,
            attention=Attention(
                compiled_latent.attend_rows(shape, kinds),
                address_of(compiled),
                ("latent", shape.row_dim),
                compiled_latent.CONSTANTS,
                compiled_latent.WORK,
            ),
            compiled=compiled,
            constants=(
                *(query_norm.weight.numpy(), norm.weight.numpy()),
                np.array([query_norm.variance_epsilon, norm.variance_epsilon], np.float32),
                *(addresses, panels, attention.scaling),
            ),
            work=(*work, (heads, rank + rope_dim), (heads, rank)),
            at_once=AtOnce(
                compiled=compile_latent_prompt(shape, kinds),
                pays=latent.expand_is_cheaper,
                work=work,
                columns=pairs.num_columns,
            ),
            rope_dim=rope_dim,
        )
        self._held = matrices  # whose addresses are among the constants

    @staticmethod
    def fits(layer: Any) -> bool:
        """Whether a module can be computed here."""
        if type(layer).__name__ not in _FAMILIES or not has_compiled_norms(layer):
            return False
        attention = layer.self_attn
        compressed = attention.q_lora_rank is not None
        return (
            all(isinstance(linear, PackedLinear) for linear in (attention.o_proj, attention.kv_b_proj))
            and (not compressed or isinstance(attention.q_b_proj, PackedLinear))
            and can_join(attention.q_a_proj if compressed else attention.q_proj, attention.kv_a_proj_with_mqa)
            and attention.o_proj.matrix.whole(attention.kv_lora_rank, attention.v_head_dim)
        )

    @staticmethod
    def _caches(arena: Arena, layer: int) -> tuple[torch.Tensor, ...]:
        return (arena.key[layer],)

    @staticmethod
    def angles(position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(position_embeddings, torch.Tensor):  # DeepSeek-V2's are complex numbers
            return position_embeddings.real, position_embeddings.imag
        return CompiledLayer.angles(position_embeddings)


def _rope(layer: Any) -> Rope:
    if type(layer).__name__ == "DeepseekV2DecoderLayer":
        return "pairs"
    return "pairs_to_halves" if layer.self_attn.config.rope_interleave else "halves"
