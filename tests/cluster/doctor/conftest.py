from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from cluster.config.load import parse_mesh
from cluster.config.mesh import MeshConfig


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with four experts in two layers, written by transformers; no tokenizer."""
    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=64,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def mesh_for() -> Callable[..., MeshConfig]:
    """`mesh_for(folder, experts={"groups": 2})`."""

    def build(source: Path, **sections: object) -> MeshConfig:
        return parse_mesh({"model": {"source": str(source)}, **sections}, origin="test")

    return build
