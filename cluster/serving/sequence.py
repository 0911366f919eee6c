"""One sequence in the engine, from submission to its last event."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from cluster.serving.kv_cache import Slot
from cluster.serving.request import FinishReason, SamplingParams, TokenEvent
from cluster.serving.sampler import SamplerState


class RunningSequence:
    """Tokens so far, where their keys and values are, and who wants to hear of it.

    tokens: prompt, then what was generated
    slot:   None while it waits (again)
    queued_s: from submission to the first step; None before it
    """

    __slots__ = (
        "_eos_ids",
        "id",
        "max_len",
        "num_prompt",
        "on_event",
        "params",
        "queued_s",
        "sampler",
        "slot",
        "submitted",
        "tokens",
    )

    def __init__(
        self,
        request_id: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_event: Callable[[TokenEvent], None],
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.id = request_id
        self.tokens = list(prompt_ids)
        self.num_prompt = len(self.tokens)
        self.params = params
        self.on_event = on_event
        self.max_len = min(self.num_prompt + params.max_tokens, max_model_len)
        self.slot: Slot | None = None
        self.submitted = time.monotonic()
        self.queued_s: float | None = None
        self._eos_ids = frozenset() if params.ignore_eos else eos_token_ids
        self.sampler = SamplerState(params, eos_token_ids | params.stop_token_ids)

    @property
    def num_computed(self) -> int:
        """Tokens whose keys and values are in the cache."""
        return 0 if self.slot is None else self.slot.length

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 when decoding."""
        return len(self.tokens) - self.num_computed

    def append(self, token_id: int) -> FinishReason | None:
        """Take a sampled token; the reason to end, if it gives one."""
        self.tokens.append(token_id)
        generated = len(self.tokens) - self.num_prompt
        if generated >= self.params.min_tokens and (
            token_id in self._eos_ids or token_id in self.params.stop_token_ids
        ):
            return "stop"
        return "length" if len(self.tokens) >= self.max_len else None
