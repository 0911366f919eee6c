"""Attention of a whole batch `[1, T, H]` over the KV cache, registered with transformers as `expertmesh`.

A model calls `StepCache.update` with the new keys and values, then `attend` with the queries. Both find the step's
layout in `AttentionBatch`: `attend` gets it as a keyword that transformers' models hand down untouched. No mask
function is registered under the name: transformers then leaves masking to the attention function.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from cluster.serving.attention_batch import AttentionBatch, DecodeGroup, PrefillSpan
from cluster.serving.latent_attention import LatentProjections

NAME = "expertmesh"
# Scores that are held at once where no fused kernel can be used: 128 MiB of float32.
_MAX_SCORES = 1 << 25


class StepCache:
    """What transformers' modules see as `past_key_values` for one step."""

    is_compileable = False

    def __init__(self, batch: AttentionBatch, *, latent: bool) -> None:
        self._batch = batch
        self._latent = latent

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new rows ([1, kv heads, T, dim]) and return them; `attend` reads the cache itself."""
        started = time.perf_counter()
        if self._latent:
            self._batch.write(layer_idx, torch.cat((key[0], value[0]), dim=-1), None)
        else:
            self._batch.write(layer_idx, key[0], value[0])
        self._batch.seconds += time.perf_counter() - started
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so nobody counts from here."""
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_batch: AttentionBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query: [1, heads, T, dim], new tokens of all sequences. Returns [1, T, heads, value dim].

    sliding_window, softcap, s_aux (a sink logit per head) mean what they mean to transformers' own functions.
    """
    started = time.perf_counter()
    layer: int = module.layer_idx
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    latent: LatentProjections | None = getattr(module, "latent_projections", None)
    query_HTD = query[0]
    outputs = []
    for group in attention_batch.decode_groups:
        rows_HBD = query_HTD[:, group.start : group.stop]
        if latent is not None:
            rows_HBD = latent.absorb(rows_HBD)
        out_HBV = _decode(rows_HBD, layer, group, scale, sliding_window, softcap, s_aux)
        outputs.append(out_HBV if latent is None else latent.unabsorb(out_HBV))
    for span in attention_batch.prefill_spans:
        rows_HTD = query_HTD[:, span.start : span.stop]
        outputs.append(_prefill(rows_HTD, layer, span, latent, scale, sliding_window, softcap, s_aux))
    heads, num_tokens = query_HTD.shape[:2]
    out_THV = outputs[0].new_empty(num_tokens, heads, outputs[0].shape[-1])
    first = 0
    for out_HTV in outputs:  # in the order of their rows
        last = first + out_HTV.shape[1]
        out_THV[first:last] = out_HTV.transpose(0, 1)
        first = last
    attention_batch.seconds += time.perf_counter() - started
    return out_THV.unsqueeze(0), None


def _decode(
    query_HBD: torch.Tensor,
    layer: int,
    group: DecodeGroup,
    scale: float,
    window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """One query row a slot against the arena's slots, all at once. Returns [heads, B, value dim]."""
    arena = group.arena
    slots = slice(group.first_slot, group.first_slot + group.num_slots)
    key_SHLD = arena.key[layer][slots, :, : group.max_len]
    value_SHLV = arena.value[layer][slots, :, : group.max_len]
    num_kv_heads = key_SHLD.shape[1]
    heads, _, dim = query_HBD.shape
    query_BHD = query_HBD.transpose(0, 1)
    if group.rows_B is not None:
        # Slots in between belong to sequences that are not decoding: they are computed and thrown away.
        query_BHD = query_BHD.new_zeros(group.num_slots, heads, dim).index_copy_(0, group.rows_B, query_BHD)
    groups = heads // num_kv_heads
    query_SHGTD = query_BHD.reshape(group.num_slots, num_kv_heads, groups, 1, dim)
    sink_HG11 = None if s_aux is None else s_aux.view(num_kv_heads, groups, 1, 1)
    hidden = group.hidden_S111L(window)
    out_SHGTV = _weigh(query_SHGTD, key_SHLD, value_SHLV, hidden, scale, softcap, sink_HG11)
    out_SHV = out_SHGTV.reshape(group.num_slots, heads, -1)
    if group.rows_B is not None:
        out_SHV = out_SHV.index_select(0, group.rows_B)
    return out_SHV.transpose(0, 1)


def _prefill(
    query_HTD: torch.Tensor,
    layer: int,
    span: PrefillSpan,
    latent: LatentProjections | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """A chunk of one sequence against its own cached tokens. Returns [heads, T, value dim]."""
    arena, index = span.slot.arena, span.slot.index
    key_HLD = arena.key[layer][index, :, : span.end]
    value_HLV = arena.value[layer][index, :, : span.end]
    absorbed = latent is not None and not latent.expand_is_cheaper(query_HTD.shape[1], span.end)
    if latent is not None:
        if absorbed:
            query_HTD = latent.absorb(query_HTD)
        else:
            key_HLD, value_HLV = latent.expand(key_HLD[0])
    visible = span.visible_TL(window, query_HTD.device)
    heads, num_kv_heads = query_HTD.shape[0], key_HLD.shape[0]
    if softcap is None and s_aux is None and not absorbed:
        dim, value_dim = key_HLD.shape[-1], value_HLV.shape[-1]
        if value_dim < dim:
            # The flash kernels want values as long as keys; without them a long prompt takes twice the time.
            value_HLV = F.pad(value_HLV, (0, dim - value_dim))
        out_HTD = F.scaled_dot_product_attention(
            query_HTD[None],
            key_HLD[None],
            value_HLV[None],
            attn_mask=visible,
            is_causal=visible is None,
            scale=scale,
            enable_gqa=heads != num_kv_heads,
        )[0]
        out_HTV = out_HTD[..., :value_dim]
    else:
        length, groups = query_HTD.shape[1], heads // num_kv_heads
        if visible is None:
            visible = torch.ones(length, span.end, dtype=torch.bool, device=query_HTD.device).tril()
        query_HGTD = query_HTD.reshape(num_kv_heads, groups, length, -1)
        sink_HG11 = None if s_aux is None else s_aux.view(num_kv_heads, groups, 1, 1)
        rows = max(1, _MAX_SCORES // (heads * span.end))
        parts = [
            _weigh(part_HGTD, key_HLD, value_HLV, ~visible_TL, scale, softcap, sink_HG11)
            for part_HGTD, visible_TL in zip(
                torch.split(query_HGTD, rows, dim=2),
                torch.split(visible, rows),
                strict=True,
            )
        ]
        out_HGTV = torch.cat(parts, dim=2)
        out_HTV = out_HGTV.reshape(heads, length, -1)
    return out_HTV if latent is None or not absorbed else latent.unabsorb(out_HTV)


def _weigh(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """Softmax attention, float32 inside: query [..., G, T, D], key [..., L, D], value [..., L, V] -> [..., G, T, V].

    hidden: True where a query may not look, broadcastable to [..., G, T, L]
    sink:   a logit that takes part in the softmax and has no value, broadcastable to [..., G, T, 1]
    The G queries of a key head are rows of one matmul, so that keys are never repeated.
    """
    shape = query.shape[:-1]
    scores = torch.matmul(query.flatten(-3, -2) * scale, key.transpose(-1, -2)).float()
    scores = scores.view(*shape, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    if sink is None:
        weights = scores.softmax(dim=-1)
    else:
        with_sink = torch.cat((scores, sink.float().expand(*shape, 1)), dim=-1)
        weights = with_sink.softmax(dim=-1)[..., :-1]
    out = torch.matmul(weights.to(value.dtype).flatten(-3, -2), value)
    return out.view(*shape, -1)


AttentionInterface.register(NAME, attend)
