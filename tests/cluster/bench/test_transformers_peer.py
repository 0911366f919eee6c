from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig

from cluster.bench.transformers_peer import generate


def test_generate_times_every_token_of_every_prompt() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
    ).eval()
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    timings = generate(model, [[5, 6, 7], [8, 9, 10]], config)
    assert len(timings) == 2
    for timing in timings:
        times = [timing["sent"], *timing["token_times"]]
        assert len(times) == 7
        assert times == sorted(times)
