"""A gate, from hidden states to experts and weights, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from experts.ops._numba.activations import exp
from experts.ops._numba.object_cache import SUMS, compiled, part
from experts.ops._numba.packed_matmul import Kind, compile_matmul

# Below every rank.
_TAKEN = np.iinfo(np.int64).min


@part(())
def _exp(x: Any) -> Any:
    return exp(x) if x == x else x  # that one knows no NaN


@part(())
def _ordered(bits: Any) -> Any:
    """A float's bits as an integer in its order, and back; those of floats below zero have the opposite one."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@part(())
def _rank(values: Any, ranks: Any) -> None:
    """Integers in the order that `torch.topk` has, NaN before all numbers, and of equals the first above the others.

    The highest of integers is found in vectors.
    """
    bits, last = values.view(np.int32), len(values) - 1
    for i in range(len(values)):
        rank = 0 if values[i] == 0 else _ordered(bits[i])  # both zeros are equal
        rank = rank if values[i] == values[i] else 0x7FFFFFFF
        ranks[i] = (np.int64(rank) << 32) | (last - i)


@part(())
def _take_best(ranks: Any, begin: Any, end: Any) -> Any:
    """Where in [begin, end) the highest rank is, which is the lowest from then on."""
    highest = ranks[begin]
    for i in range(begin + 1, end):
        highest = max(highest, ranks[i])
    best = len(ranks) - 1 - (highest & 0xFFFFFFFF)
    ranks[best] = _TAKEN
    return best


@part((), fastmath=SUMS)
def _sum(values: Any) -> Any:
    total = np.float32(0)
    for i in range(len(values)):
        total += values[i]
    return total


@part(())
def _softmax(values: Any) -> None:
    bits = values.view(np.int32)
    highest = _ordered(bits[0])
    for i in range(1, len(values)):
        highest = max(highest, _ordered(bits[i]))
    most = np.int32(_ordered(highest)).view(np.float32)
    for i in range(len(values)):
        values[i] = _exp(values[i] - most)
    total = _sum(values)
    for i in range(len(values)):
        values[i] /= total


@cache
def compile_choose_experts(
    logits: Kind, score: str, weight: str, group_score: str | None, closed: float
) -> Callable[..., None]:
    """The compiled gate; it runs without the GIL. For the words see `router_service.gating.compiled_gate.GateFormula`.

    What a softmax or sigmoid has below 1e-38 is one tiny number in place of several, or of 0.

    Arguments:
        hidden_TH      float32 [T, H]
        panels, scales, biases   int64 [1]: addresses of the packed linear layer's
        num_panels     of that layer
        bias_E         float32 [E], added to scores where experts are chosen
        num_groups, best_groups, scale, epsilon
        logits_TP      float32 [T, whole panels], to work in
    What it fills:
        expert_ids_TK  int64 [T, K], best first, the lower number of equals;  weights_TK  float32 [T, K]
    """
    multiply = compile_matmul(logits[0], biased=logits[1])

    def choose_experts(
        hidden_TH: Any,
        panels: Any,
        scales: Any,
        biases: Any,
        num_panels: Any,
        bias_E: Any,
        num_groups: Any,
        best_groups: Any,
        scale: Any,
        epsilon: Any,
        logits_TP: Any,
        expert_ids_TK: Any,
        weights_TK: Any,
    ) -> None:
        num_tokens, hidden_size = hidden_TH.shape
        num_experts, top_k = len(bias_E), expert_ids_TK.shape[1]
        starts = np.array([0, num_tokens])
        multiply(
            *(panels, scales, biases, starts, num_panels, hidden_size),
            *(hidden_TH.ctypes.data, hidden_size * 4, logits_TP.ctypes.data, logits_TP.shape[1] * 4),
        )
        choice_E, group_G = np.empty(num_experts, np.float32), np.empty(num_groups, np.float32)
        ranks_E, ranks_G = np.empty(num_experts, np.int64), np.empty(num_groups, np.int64)
        open_G = np.empty(num_groups, np.bool_)
        for token in range(num_tokens):
            scores_E = logits_TP[token, :num_experts]
            if score == "softmax":
                _softmax(scores_E)
            elif score == "sigmoid":
                for expert in range(num_experts):
                    scores_E[expert] = np.float32(1) / (np.float32(1) + _exp(-scores_E[expert]))
            for expert in range(num_experts):
                choice_E[expert] = scores_E[expert] + bias_E[expert]

            if group_score is not None:
                size = num_experts // num_groups
                _rank(choice_E, ranks_E)
                for group in range(num_groups):
                    begin, end = group * size, (group + 1) * size
                    group_G[group] = choice_E[_take_best(ranks_E, begin, end)]
                    if group_score == "best_two":
                        group_G[group] += choice_E[_take_best(ranks_E, begin, end)]
                    open_G[group] = False
                _rank(group_G, ranks_G)
                for _ in range(best_groups):
                    open_G[_take_best(ranks_G, 0, num_groups)] = True
                for group in range(num_groups):
                    if not open_G[group]:
                        for expert in range(group * size, (group + 1) * size):
                            choice_E[expert] = closed
                            if closed == 0:
                                scores_E[expert] = closed

            _rank(choice_E, ranks_E)
            total = np.float32(0)
            for k in range(top_k):
                best = _take_best(ranks_E, 0, num_experts)
                expert_ids_TK[token, k] = best
                weights_TK[token, k] = scores_E[best]
                total += scores_E[best]
            if weight == "softmax":
                _softmax(weights_TK[token])
            for k in range(top_k):
                if weight == "normalised":
                    weights_TK[token, k] /= total + epsilon
                weights_TK[token, k] *= scale

    ints, floats, single = types.int64[::1], types.float32[:, ::1], types.float32
    signature = types.void(
        *(floats, ints, ints, ints, types.int64, types.float32[::1], types.int64, types.int64, single, single),
        *(floats, types.int64[:, ::1], floats),
    )
    variant = *logits, score, weight, group_score, closed
    return compiled(choose_experts, signature, variant=variant, error_model="numpy")
