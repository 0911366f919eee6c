"""A layer with grouped-query attention on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cluster.serving.compiled_layer import AtOnce, CompiledLayer, has_compiled_norms
from cluster.serving.kv_cache import Arena
from cluster.serving.packed_linear import PackedLinear, can_join, join_layers
from experts.ops.cpu_threads import ThreadTeam

# Families whose layers are exactly this: biases where their attention has them, norms of queries and keys over a head
# where it has `q_norm`, rotary halves, a window.
_FAMILIES = {"MixtralDecoderLayer", "Qwen3MoeDecoderLayer"}
_NO_WINDOW = 1 << 62
# Tokens that pay for packing their sequence's keys and values.
_LEAST_PROMPT = 8


class GroupedQueryLayer(CompiledLayer):
    """See CompiledLayer."""

    def __init__(self, layer: Any, team: ThreadTeam) -> None:
        # Loads LLVM, which a GPU's process does not need.
        from cluster.serving._numba import grouped_query
        from cluster.serving._numba.attend_block import whole_panels
        from cluster.serving._numba.decode_layers import Attention
        from cluster.serving._numba.grouped_query_parts import GroupedQueryShape
        from cluster.serving._numba.grouped_query_prompt import compile_grouped_query_prompt
        from experts.ops._numba.call import address_of
        from experts.ops._numba.vectors import PANEL

        attention = layer.self_attn
        into, onto = join_layers(attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj.matrix
        head_dim: int = attention.head_dim
        heads = attention.q_proj.out_features // head_dim
        norm = getattr(attention, "q_norm", None)
        norms, epsilon = np.empty((2, 0), np.float32), 0.0
        if norm is not None:
            norms = np.stack([norm.weight.numpy(), attention.k_norm.weight.numpy()])
            epsilon = norm.variance_epsilon
        shape = GroupedQueryShape(
            heads=heads,
            kv_heads=attention.k_proj.out_features // head_dim,
            head_dim=head_dim,
            normed=norm is not None,
        )
        kinds = into.kind, onto.kind
        work = ((into.num_columns,), (heads * head_dim,), (onto.num_columns,))
        compiled = grouped_query.compile_grouped_query(shape, *kinds)
        super().__init__(
            layer,
            team,
            attention=Attention(
                grouped_query.attend_rows(shape, *kinds),
                address_of(compiled),
                ("grouped query", shape.kv_heads, head_dim),
                grouped_query.CONSTANTS,
                grouped_query.WORK,
            ),
            compiled=compiled,
            constants=(
                *(norms, epsilon, *(np.array(matrix.addresses())[:, None] for matrix in (into, onto))),
                np.array([len(into.panels), len(onto.panels)]),
                getattr(attention.config, "sliding_window", None) or _NO_WINDOW,
                attention.scaling,
            ),
            work=work,
            at_once=AtOnce(
                compiled=compile_grouped_query_prompt(shape, *kinds),
                pays=lambda num_tokens, _: num_tokens >= _LEAST_PROMPT,
                work=work,
                columns=shape.kv_heads * (head_dim + whole_panels(head_dim)),
                multiple=PANEL,
            ),
            rope_dim=head_dim,
        )
        self._held = into, onto  # whose addresses are among the constants

    @staticmethod
    def fits(layer: Any) -> bool:
        """Whether a module can be computed here."""
        if type(layer).__name__ not in _FAMILIES or not has_compiled_norms(layer):
            return False
        attention = layer.self_attn
        rope = getattr(attention.config, "rope_parameters", None) or {}
        return (
            rope.get("partial_rotary_factor", 1.0) == 1.0
            and isinstance(attention.o_proj, PackedLinear)
            and can_join(attention.q_proj, attention.k_proj, attention.v_proj)
        )

    @staticmethod
    def _caches(arena: Arena, layer: int) -> tuple[torch.Tensor, ...]:
        return arena.key[layer], arena.value[layer]
