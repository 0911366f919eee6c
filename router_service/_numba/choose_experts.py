"""A gate of a few tokens, from hidden states to experts and weights, compiled for this machine's CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import types

from experts.ops._numba.activations import exp
from experts.ops._numba.object_cache import compiled, part
from experts.ops._numba.packed_matmul import Kind, compile_matmul


@part(())
def _exp(x: Any) -> Any:
    return exp(x) if x == x else x  # that one knows no NaN


@part(())
def _is_above(value: Any, other: Any) -> Any:
    """The order that `torch.topk` has: NaN before all numbers."""
    return value > other or (value != value and other == other)


@part(())
def _take_best(values: Any, taken: Any) -> Any:
    """The first of the best that are not yet taken, and takes it."""
    best = -1
    for i in range(len(values)):
        if not taken[i] and (best < 0 or _is_above(values[i], values[best])):
            best = i
    taken[best] = True
    return best


@part(())
def _softmax(values: Any) -> None:
    most, total = values[0], np.float32(0)
    for i in range(1, len(values)):
        if _is_above(values[i], most):
            most = values[i]
    for i in range(len(values)):
        values[i] = _exp(values[i] - most)
        total += values[i]
    for i in range(len(values)):
        values[i] /= total


@cache
def compile_choose_experts(
    logits: Kind, score: str, weight: str, group_score: str | None, closed: float
) -> Callable[..., None]:
    """The compiled gate; it runs without the GIL. For the words see `router_service.gating.compiled_gate.GateFormula`.

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
                for group in range(num_groups):
                    members, taken = choice_E[group * size : (group + 1) * size], np.zeros(size, np.bool_)
                    group_G[group] = members[_take_best(members, taken)]
                    if group_score == "best_two":
                        group_G[group] += members[_take_best(members, taken)]
                open_G = np.zeros(num_groups, np.bool_)
                for _ in range(best_groups):
                    _take_best(group_G, open_G)
                for expert in range(num_experts):
                    if not open_G[expert // size]:
                        choice_E[expert] = closed
                        if closed == 0:
                            scores_E[expert] = closed

            taken_E = np.zeros(num_experts, np.bool_)
            total = np.float32(0)
            for k in range(top_k):
                best = _take_best(choice_E, taken_E)
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
