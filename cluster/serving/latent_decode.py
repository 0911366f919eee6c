"""Multi-head latent attention of a decode step on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cluster.serving.decode_attention import DecodeAttention, DecodeRows
from cluster.serving.packed_linear import PackedLinear, can_join, join_layers
from experts.ops.cpu_threads import ThreadTeam
from experts.ops.packed_matmul import pack_exactly

# Families whose attention is exactly this; they differ in how they turn pairs.
_FAMILIES = {"DeepseekV2Attention", "DeepseekV3Attention"}


class LatentDecode(DecodeAttention):
    """See DecodeAttention, and `cluster.serving.latent_attention` for what is absorbed."""

    def __init__(self, attention: Any, team: ThreadTeam) -> None:
        super().__init__(attention, attention.o_proj.matrix, attention.qk_rope_head_dim, team)
        # Loads LLVM, which a GPU's process does not need.
        from cluster.serving._numba.latent_decode import compile_latent_decode

        heads, rank, rope_dim = attention.num_heads, attention.kv_lora_rank, attention.qk_rope_head_dim
        nope, value_dim = attention.qk_nope_head_dim, attention.v_head_dim
        compressed = attention.q_lora_rank is not None
        latent = attention.latent_projections
        into = join_layers(attention.q_a_proj if compressed else attention.q_proj, attention.kv_a_proj_with_mqa)
        queries = attention.q_b_proj.matrix if compressed else into
        absorb = pack_exactly(latent.up_key_HNR.transpose(1, 2).reshape(-1, nope))
        expand = pack_exactly(latent.up_value_HRV.transpose(1, 2).reshape(-1, rank))
        self._held = matrices = [into, queries, absorb, expand, self._onto]
        # Each head's part of a matrix, panel by panel; `heads` times the whole where it has none.
        parts = [1, 1, heads, heads, 1]
        self._panels = np.array([len(matrix.panels) // of for matrix, of in zip(matrices, parts, strict=True)])
        self._addresses = np.array([matrix.addresses() for matrix in matrices])[:, :, None].repeat(heads, axis=2)
        for number in (2, 3):
            self._addresses[number, 0] += np.arange(heads) * (matrices[number].nbytes // heads)
        norm = attention.kv_a_layernorm
        query_norm = attention.q_a_layernorm if compressed else norm
        self._norms = query_norm.weight.numpy(), norm.weight.numpy()
        self._epsilons = np.array([query_norm.variance_epsilon, norm.variance_epsilon], np.float32)
        self._layer: int = attention.layer_idx
        self._scale: float = attention.scaling
        self._complex_angles = type(attention).__name__ == "DeepseekV2Attention"
        self._compressed = compressed
        self._work = (heads, rank + rope_dim), (heads, rank), (heads * value_dim,)
        self._compiled = compile_latent_decode(
            heads=heads,
            nope=nope,
            rope_dim=rope_dim,
            rank=rank,
            value_dim=value_dim,
            query_rank=attention.q_lora_rank or 0,
            rope=self._rope(attention),
            kinds=tuple(matrix.kind for matrix in matrices),
        )

    @staticmethod
    def fits(attention: Any) -> bool:
        """Whether a module's decode steps can be computed here."""
        if type(attention).__name__ not in _FAMILIES:
            return False
        compressed = attention.q_lora_rank is not None
        return (
            isinstance(attention.o_proj, PackedLinear)
            and (not compressed or isinstance(attention.q_b_proj, PackedLinear))
            and can_join(attention.q_a_proj if compressed else attention.q_proj, attention.kv_a_proj_with_mqa)
            and attention.o_proj.matrix.whole(attention.kv_lora_rank, attention.v_head_dim)
        )

    @staticmethod
    def _rope(attention: Any) -> str:
        if type(attention).__name__ == "DeepseekV2Attention":
            return "pairs"
        return "pairs_to_halves" if attention.config.rope_interleave else "halves"

    def _angles(self, position_embeddings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._complex_angles:
            return position_embeddings.real, position_embeddings.imag
        return super()._angles(position_embeddings)

    def _compute(self, rows: DecodeRows) -> None:
        num_rows = len(rows.hidden_TH)
        projected, queries = (np.empty((num_rows, each.num_columns), np.float32) for each in self._held[:2])
        if not self._compressed:
            queries = projected
        work = [np.empty((num_rows, *shape), np.float32) for shape in self._work]
        self._compiled(
            *(rows.hidden_TH, self._addresses, self._panels, *self._norms, self._epsilons),
            *(rows.cos_TD, rows.sin_TD, rows.keys),
            *(self._layer, rows.slots_T, rows.positions_T, self._scale, projected, queries, *work, rows.out_TP),
        )
