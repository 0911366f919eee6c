from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from cluster.serving.latent_attention import LatentProjections

HEADS, NOPE, ROPE, RANK, VALUE = 3, 6, 4, 8, 5


def projections() -> LatentProjections:
    torch.manual_seed(0)
    kv_b_proj = nn.Linear(RANK, HEADS * (NOPE + VALUE), bias=False).double()
    return LatentProjections(
        SimpleNamespace(
            qk_nope_head_dim=NOPE,
            qk_rope_head_dim=ROPE,
            kv_lora_rank=RANK,
            v_head_dim=VALUE,
            kv_b_proj=kv_b_proj.requires_grad_(False),
        )
    )


def test_absorbing_equals_expanding() -> None:
    latent = projections()
    query_HTD = torch.randn(HEADS, 7, NOPE + ROPE, dtype=torch.double)
    rows_LD = torch.randn(11, RANK + ROPE, dtype=torch.double)
    key_HLD, value_HLV = latent.expand(rows_LD)
    assert key_HLD.shape == (HEADS, 11, NOPE + ROPE)
    expanded_HTL = query_HTD @ key_HLD.transpose(1, 2)
    absorbed_HTL = latent.absorb(query_HTD) @ rows_LD.T
    torch.testing.assert_close(absorbed_HTL, expanded_HTL)
    weights_HTL = expanded_HTL.softmax(-1)
    torch.testing.assert_close(latent.unabsorb(weights_HTL @ rows_LD[:, :RANK]), weights_HTL @ value_HLV)


def test_long_chunks_expand() -> None:
    latent = projections()
    assert not latent.expand_is_cheaper(1, 500)
    assert latent.expand_is_cheaper(1000, 1000)
    assert latent.expand_is_cheaper(2, 2)  # a prompt's beginning: absorbing would be as much work
