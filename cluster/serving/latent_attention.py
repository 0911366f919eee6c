"""Multi-head latent attention over cached latents (DeepSeek-V2, arXiv:2405.04434, section 2.1).

The cache holds one row `[c_kv, k_rope]` a token. Scores against many cached tokens are cheapest without expanding
them: W_UK is absorbed into the query and W_UV applied to the summed latents. A prompt's beginning, or a long chunk of
it, is cheaper the other way: expand the latents once, then attend with small heads. Both are exact;
`expand_is_cheaper` counts multiplications.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch


class LatentProjections:
    """W_UK and W_UV of one attention layer, as views of its `kv_b_proj`'s weight as it is now.

    up_key_HNR: [heads, qk_nope_head_dim, kv_lora_rank];  up_value_HRV: [heads, kv_lora_rank, v_head_dim]
    """

    def __init__(self, attention: Any) -> None:
        self.nope: int = attention.qk_nope_head_dim
        self.rope: int = attention.qk_rope_head_dim
        self.rank: int = attention.kv_lora_rank
        self.value_dim: int = attention.v_head_dim
        self._attention = attention
        self.weight: torch.Tensor = attention.kv_b_proj.weight
        per_head = self.weight.view(-1, self.nope + self.value_dim, self.rank)
        self.expand_is_cheaper = partial(_expand_is_cheaper, self.nope, self.rope, self.rank, self.value_dim)
        self.up_key_HNR = per_head[:, : self.nope]
        self.up_value_HRV = per_head[:, self.nope :].transpose(1, 2)

    def absorb(self, query_HTD: torch.Tensor) -> torch.Tensor:
        """Queries that score against latents: [heads, T, kv_lora_rank + qk_rope_head_dim]."""
        nope_HTN, rope_HTD = torch.split(query_HTD, [self.nope, self.rope], dim=-1)
        return torch.cat((torch.bmm(nope_HTN, self.up_key_HNR), rope_HTD), dim=-1)

    def unabsorb(self, latents_HTR: torch.Tensor) -> torch.Tensor:
        """Weighted sums of latents to values: [heads, T, v_head_dim]."""
        return torch.bmm(latents_HTR, self.up_value_HRV)

    def expand(self, rows_LD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [heads, L, qk_head_dim] and values [heads, L, v_head_dim] of cached rows."""
        latents_LR, rope_LD = torch.split(rows_LD, [self.rank, self.rope], dim=-1)
        expanded = self._attention.kv_b_proj(latents_LR).view(rows_LD.shape[0], -1, self.nope + self.value_dim)
        nope_LHN, value_LHV = torch.split(expanded, [self.nope, self.value_dim], dim=-1)
        # Several times as fast as `torch.cat`, which goes number by number through what does not lie side by side.
        key_LHD = expanded.new_empty(*expanded.shape[:2], self.nope + self.rope)
        key_LHD[..., : self.nope] = nope_LHN
        key_LHD[..., self.nope :] = rope_LD[:, None]
        return key_LHD.transpose(0, 1), value_LHV.transpose(0, 1)


def _expand_is_cheaper(nope: int, rope: int, rank: int, value_dim: int, num_queries: int, num_cached: int) -> bool:
    """Whether expanding `num_cached` tokens, the queries' own among them, costs less than absorbing the queries and
    what is saved on their scores and sums."""
    saved = (2 * rank + rope) - (nope + rope + value_dim)
    one = rank * (nope + value_dim)  # expanding a token, or absorbing a query
    return (num_cached - num_queries) * one < num_queries * num_cached * saved
