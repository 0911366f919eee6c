from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from cluster.serving.request import SamplingParams
from cluster.serving.sampler import SamplerState, sample

VOCAB = 40


def state(end_ids: frozenset[int] = frozenset(), **params: Any) -> SamplerState:
    return SamplerState(SamplingParams(max_tokens=10, **params), end_ids)


def logits_of(rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3)) * 2


def frequencies(params: dict[str, Any], logits_V: torch.Tensor, draws: int = 20_000) -> torch.Tensor:
    states = [state(**params) for _ in range(draws)]
    torch.manual_seed(0)
    tokens, _ = sample(logits_V.expand(draws, -1).clone(), states)
    counts = Counter(tokens)
    return torch.tensor([counts[token] / draws for token in range(logits_V.shape[-1])])


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 2.0, "top_k": 5}, [TemperatureLogitsWarper(2.0), TopKLogitsWarper(5)]),
        ({"temperature": 1.0, "top_p": 0.7}, [TopPLogitsWarper(0.7)]),
        ({"temperature": 1.0, "min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        (
            {"temperature": 1.5, "min_p": 0.02, "top_k": 12, "top_p": 0.8},
            [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.02), TopKLogitsWarper(12), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_distribution_equals_transformers_warpers(params: dict[str, Any], warpers: list[Any]) -> None:
    logits_V = logits_of()[0]
    expected = logits_V[None].clone()
    for warper in warpers:
        expected = warper(None, expected)
    expected_V = expected.softmax(-1)[0]
    drawn_V = frequencies(params, logits_V)
    assert not drawn_V[expected_V == 0].any()
    # Five standard deviations of a frequency over 20 000 draws.
    tolerance_V = 5 * (expected_V * (1 - expected_V) / 20_000).sqrt() + 1e-4
    assert ((drawn_V - expected_V).abs() <= tolerance_V).all()


def test_top_p_beyond_the_first_candidates() -> None:
    logits_V = torch.zeros(3000)
    drawn_V = frequencies({"temperature": 1.0, "top_p": 0.9}, logits_V)
    assert 2500 < int((drawn_V > 0).sum()) <= 2701


def test_greedy_is_argmax_beside_sampled_rows() -> None:
    logits_BV = logits_of(4)
    states = [state(temperature=0.0), state(seed=1), state(temperature=0.0, top_p=0.5), state(seed=1, top_k=3)]
    tokens, _ = sample(logits_BV.clone(), states)
    assert [tokens[0], tokens[2]] == [int(logits_BV[0].argmax()), int(logits_BV[2].argmax())]


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"top_k": 4}, {"min_p": 0.1}])
def test_seeded_row_does_not_depend_on_the_batch(params: dict[str, Any]) -> None:
    logits_BV = logits_of(4)
    alone = [sample(logits_BV[:1].clone(), [seeded])[0][0] for seeded in [state(seed=5, **params)] for _ in range(8)]
    seeded, others = state(seed=5, **params), [state(top_p=0.3), state(top_k=2, seed=9), state(temperature=0.0)]
    beside = [sample(logits_BV.clone(), [seeded, *others])[0][0] for _ in range(8)]
    assert alone == beside
    assert len(set(alone)) > 1


def test_penalties_count_generated_tokens() -> None:
    logits_BV = torch.zeros(1, VOCAB)
    logits_BV[0, 7], logits_BV[0, 8] = 1.0, 0.5
    frequency = state(temperature=0.0, frequency_penalty=0.2)
    assert [sample(logits_BV.clone(), [frequency])[0][0] for _ in range(5)] == [7, 7, 7, 8, 7]
    presence = state(temperature=0.0, presence_penalty=0.6)
    assert [sample(logits_BV.clone(), [presence])[0][0] for _ in range(4)] == [7, 8, 7, 7]


def test_min_tokens_holds_end_tokens_back() -> None:
    logits_BV = torch.zeros(1, VOCAB)
    logits_BV[0, 3] = 5.0
    holding = state(frozenset({3}), temperature=0.0, min_tokens=2)
    drawn = [sample(logits_BV.clone(), [holding])[0][0] for _ in range(3)]
    assert drawn[0] != 3
    assert drawn[1] != 3
    assert drawn[2] == 3


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits_BV = logits_of(2)
    expected_BV = logits_BV.log_softmax(-1)
    asking = state(temperature=0.3, top_k=2, presence_penalty=1.0, logprobs=3, seed=0)
    tokens, logprobs = sample(logits_BV.clone(), [state(temperature=0.0), asking])
    assert logprobs[0] is None
    described = logprobs[1]
    assert described is not None
    assert described.token_id == tokens[1]
    assert described.logprob == pytest.approx(float(expected_BV[1, tokens[1]]), abs=1e-5)
    values, ids = expected_BV[1].topk(3)
    assert [token for token, _ in described.top] == ids.tolist()
    assert [value for _, value in described.top] == pytest.approx(values.tolist(), abs=1e-5)
    _, (chosen_only,) = sample(logits_of(), [state(temperature=0.0, logprobs=0)])
    assert chosen_only is not None
    assert chosen_only.top == ()
