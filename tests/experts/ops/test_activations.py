"""Activations against transformers', gating and its GPT-OSS variant against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numba import njit
from transformers.activations import ACT2FN

from experts.ops._numba.activations import COMPILED
from experts.ops.activations import ACTIVATIONS, activate
from experts.spec import ExpertSpec


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) & set(ACT2FN)))
def test_equals_transformers(name: str) -> None:
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x))


def test_every_activation_is_compiled_for_cpu() -> None:
    assert COMPILED.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("name", sorted(set(COMPILED) - {"swish", "gelu_new", "gelu_pytorch_tanh"}))
def test_compiled_equals_float64(name: str) -> None:
    act = COMPILED[name]
    x = torch.cat(
        [torch.linspace(-12, 12, 5001), torch.tensor([-1e30, -100.0, 100.0, 1e18, float("nan"), float("inf")])]
    )
    got = np.empty_like(x.numpy())

    @njit(error_model="numpy")
    def run(values: np.ndarray, results: np.ndarray) -> None:
        for i in range(len(values)):
            results[i] = act(values[i])

    run(x.numpy(), got)
    expected = ACTIVATIONS[name](x.double()).float()
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=2e-6, atol=5e-7, equal_nan=True)


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
