"""Tiny checkpoints that transformers itself wrote, and the modules that wrote them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from experts.group import ExpertGroup
from experts.ops.cpu_backend import CpuBackend
from experts.server import ExpertServer
from experts.spec import ExpertKey
from experts.weights.checkpoint import Checkpoint
from experts.weights.layout import describe_experts

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_DEEPSEEK = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_local_experts": 6},
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 24, "num_experts_per_tok": 2},
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None},
    "deepseek_v3": {**_DEEPSEEK, "q_lora_rank": 16},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 6, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 3},
}

TinyCheckpoint = tuple[Path, transformers.PreTrainedModel]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyCheckpoint]:
    """`tiny_checkpoint(family, sharded=False)`: directory and model (3 layers, 6 experts), made once."""
    made: dict[tuple[str, bool], TinyCheckpoint] = {}

    def make(family: str, sharded: bool = False) -> TinyCheckpoint:
        if (family, sharded) not in made:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family]})
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            directory = tmp_path_factory.mktemp(family)
            model.save_pretrained(directory, **({"max_shard_size": "40KB"} if sharded else {}))
            made[family, sharded] = directory, model
        return made[family, sharded]

    return make


@pytest.fixture
def loaded_group(tiny_checkpoint: Callable[..., TinyCheckpoint]) -> ExpertGroup:
    """Group 2 with every expert of layers 0 and 1 of the tiny Mixtral."""
    checkpoint = Checkpoint(tiny_checkpoint("mixtral")[0])
    layout = describe_experts(checkpoint, checkpoint.config())
    group = ExpertGroup(2, layout.spec, CpuBackend(layout.spec))
    group.assign(layout, checkpoint, [ExpertKey(layer, expert) for layer in (0, 1) for expert in range(6)])
    return group


@pytest.fixture
def server(loaded_group: ExpertGroup) -> Iterator[ExpertServer]:
    """`loaded_group` behind a socket."""
    server = ExpertServer(loaded_group)
    server.start()
    yield server
    server.stop()
