"""What the API asks of the engine and what the engine answers. Plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens of one sequence are chosen. Names and meanings are OpenAI's and vLLM's; the API checks.

    max_tokens: most tokens to generate; the engine also stops at max_model_len
    logprobs:   None, or how many alternatives to report beside the chosen token (0 to 20)
    stop_token_ids: end the sequence; the token itself is not part of the text
    min_tokens: no end token is sampled before so many tokens
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprob:
    """Log-probability of a token, and of the likeliest alternatives, descending."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """One engine step's news of one sequence.

    token_id:      the token, None where the sequence ended without one (abort, error)
    finish_reason: None while it goes on
    queued_s:      seconds that the sequence waited before its first step
    error:         message and HTTP status where finish_reason is "error"
    """

    token_id: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    queued_s: float | None = None
    error: str | None = None
    error_status: int = 500
