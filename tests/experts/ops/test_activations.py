"""Activations against transformers', gating and its GPT-OSS variant against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.activations import ACT2FN

from experts.ops.activations import ACTIVATIONS, activate
from experts.spec import ExpertSpec


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) & set(ACT2FN)))
def test_equals_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x))


def test_gate_comes_first() -> None:
    spec = ExpertSpec(hidden_size=1, intermediate_size=2, activation="relu")
    assert activate(torch.tensor([[-1.0, 2.0, 3.0, 4.0]]), spec).tolist() == [[0.0, 8.0]]


def test_plain() -> None:
    spec = ExpertSpec(hidden_size=1, intermediate_size=2, activation="relu2", gated=False)
    assert activate(torch.tensor([[-1.0, 3.0]]), spec).tolist() == [[0.0, 9.0]]


@pytest.mark.parametrize(("gate", "up"), [(1.0, 2.0), (9.0, 2.0), (-9.0, 2.0), (1.0, -9.0), (1.0, 9.0)])
def test_gpt_oss(gate: float, up: float) -> None:
    spec = ExpertSpec(hidden_size=1, intermediate_size=1, activation="quick_gelu", limit=7.0, up_shift=1.0)
    clamped, shifted = min(gate, 7.0), min(max(up, -7.0), 7.0) + 1
    expected = shifted * clamped / (1 + math.exp(-1.702 * clamped))
    got = activate(torch.tensor([[gate, up]], dtype=torch.float64), spec)
    assert got.item() == pytest.approx(expected)
