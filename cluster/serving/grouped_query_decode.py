"""Grouped-query attention of a decode step on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.serving.decode_attention import DecodeAttention, DecodeRows, Floats
from cluster.serving.packed_linear import PackedLinear, can_join, join_layers
from experts.ops.cpu_threads import ThreadTeam

# Families whose attention is exactly this: biases where their layers have them, norms of queries and keys over a head
# where they have `q_norm`, rotary halves, a window.
_FAMILIES = {"MixtralAttention", "Qwen3MoeAttention"}
_NO_WINDOW = 1 << 62


class GroupedQueryDecode(DecodeAttention):
    """See DecodeAttention."""

    # Their keys and values stay in a core's second cache.
    most_prompt = 256

    def __init__(self, attention: Any, team: ThreadTeam) -> None:
        super().__init__(attention, attention.o_proj.matrix, attention.head_dim, team)
        # Loads LLVM, which a GPU's process does not need.
        from cluster.serving._numba.grouped_query_decode import compile_grouped_query_decode

        into, onto = join_layers(attention.q_proj, attention.k_proj, attention.v_proj), self._onto
        head_dim: int = attention.head_dim
        heads = attention.q_proj.out_features // head_dim
        self._held = into  # whose addresses follow
        self._addresses = [np.array(matrix.addresses())[:, None] for matrix in (into, onto)]
        self._panels = np.array([len(into.panels), len(onto.panels)])
        norm, none = getattr(attention, "q_norm", None), np.empty(0, np.float32)
        self._norms: tuple[Floats, Floats, float] = none, none, 0.0
        if norm is not None:
            self._norms = norm.weight.numpy(), attention.k_norm.weight.numpy(), norm.variance_epsilon
        self._layer: int = attention.layer_idx
        self._window: int = getattr(attention.config, "sliding_window", None) or _NO_WINDOW
        self._scale: float = attention.scaling
        self._work = into.num_columns, heads * head_dim
        self._compiled = compile_grouped_query_decode(
            heads=heads,
            kv_heads=attention.k_proj.out_features // head_dim,
            head_dim=head_dim,
            normed=norm is not None,
            into=into.kind,
            onto=onto.kind,
        )

    @staticmethod
    def fits(attention: Any) -> bool:
        """Whether a module's decode steps can be computed here."""
        rope = getattr(getattr(attention, "config", None), "rope_parameters", None) or {}
        return (
            type(attention).__name__ in _FAMILIES
            and rope.get("partial_rotary_factor", 1.0) == 1.0
            and isinstance(attention.o_proj, PackedLinear)
            and can_join(attention.q_proj, attention.k_proj, attention.v_proj)
        )

    def _compute(self, rows: DecodeRows) -> None:
        work = [np.empty((len(rows.hidden_TH), size), np.float32) for size in self._work]
        self._compiled(
            *(rows.hidden_TH, *self._addresses, self._panels, *self._norms),
            *(rows.cos_TD, rows.sin_TD, rows.keys, rows.values, self._layer),
            *(rows.slots_T, rows.positions_T, self._window, self._scale, *work, rows.out_TP),
        )
