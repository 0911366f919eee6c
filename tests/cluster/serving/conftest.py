"""A router that computes experts with transformers' own modules, so that these tests rest on nothing else of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from cluster.serving.skeleton import ModelSkeleton, load_skeleton
from router_service.gating.gate import Gate


class Answered:
    """Work that is already done."""

    def __init__(self, combined_TH: torch.Tensor) -> None:
        self._combined_TH = combined_TH

    def result(self) -> torch.Tensor:
        return self._combined_TH

    def cancel(self) -> None:
        """Nothing is out."""


class ReferenceRouter:
    """`route` and `dispatch` over the experts modules of a transformers model."""

    def __init__(self, reference: Any, gates: dict[int, Gate]) -> None:
        self._gates = gates
        self._experts = {}
        for name, module in reference.named_modules():
            if name.endswith(".experts"):
                self._experts[int(name.split(".layers.")[1].split(".")[0])] = module

    def route(self, layer: int, hidden_TH: torch.Tensor) -> Answered:
        return self.dispatch(layer, hidden_TH, *self._gates[layer](hidden_TH))

    def dispatch(
        self, layer: int, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Answered:
        return Answered(self._experts[layer](hidden_TH, expert_ids_TK, weights_TK))


@pytest.fixture(scope="session")
def reference_model(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """family -> transformers' own model of the tiny checkpoint, eager attention and experts."""

    def load(family: str) -> Any:
        directory = tiny_checkpoint(family)
        if family == "kimi_k2":
            # Kimi K2 is DeepSeek-V3 under another name, which transformers does not know.
            document = json.loads((directory / "config.json").read_text())
            config = DeepseekV3Config.from_dict(document | {"model_type": "deepseek_v3"})
            return DeepseekV3ForCausalLM.from_pretrained(
                directory, config=config, dtype=torch.float32, attn_implementation="eager"
            )
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )

    return load


@pytest.fixture(scope="session")
def reference_router() -> Callable[..., ReferenceRouter]:
    """(transformers' model, gates) -> router over its experts."""
    return ReferenceRouter


@pytest.fixture(scope="session")
def connected_skeleton(
    tiny_checkpoint: Callable[[str], Path], reference_model: Callable[[str], Any]
) -> Callable[[str], tuple[ModelSkeleton, Any]]:
    """family -> (skeleton connected to a ReferenceRouter, transformers' model)."""

    def connect(family: str) -> tuple[ModelSkeleton, Any]:
        reference = reference_model(family)
        skeleton = load_skeleton(tiny_checkpoint(family), dtype=torch.float32, device=torch.device("cpu"))
        skeleton.connect(ReferenceRouter(reference, dict(skeleton.gates)))
        return skeleton, reference

    return connect
