"""Beside a long sequence a short one has the logits that it has alone, up to the reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import MixtralConfig, PhimoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from cluster.serving.rope_reach import rope_reach

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 256}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("config", "embedding", "reach"),
    [
        (PhimoeConfig(**SIZES, rope_parameters=LONGROPE), PhimoeRotaryEmbedding, 64),
        (
            MixtralConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}),
            MixtralRotaryEmbedding,
            256,
        ),
        (MixtralConfig(**SIZES), MixtralRotaryEmbedding, 256),
    ],
    ids=["longrope", "dynamic", "default"],
)
def test_reach(config: Any, embedding: Any, reach: int) -> None:
    assert rope_reach(config) == reach
    rope, hidden = embedding(config), torch.zeros(1, 1, 32)

    def of_position_9(longest: int) -> tuple[torch.Tensor, ...]:
        return tuple(part[0, 0] for part in rope(hidden, torch.tensor([[9, longest]])))

    alone = of_position_9(9)
    assert all(map(torch.equal, of_position_9(reach - 1), alone))
    if "rope_type" in config.rope_parameters and config.rope_parameters["rope_type"] != "default":
        assert not all(map(torch.equal, of_position_9(reach), alone))


def test_a_set_for_each_kind_of_layer() -> None:
    config = MixtralConfig(**SIZES)
    config.rope_parameters = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default"}}
    assert rope_reach(config) == 64
