"""/v1/completions, outgoing: the whole object, or its chunks."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from cluster.serving.generation import Delta, Usage
from cluster.serving.logprobs import completion_logprobs
from cluster.serving.response import usage_object
from cluster.serving.tokenizer import Tokenizer


class CompletionResponse:
    """Of one request. The parts that are the same in every chunk are rendered once."""

    def __init__(self, *, model: str, tokenizer: Tokenizer, with_logprobs: bool, include_usage: bool = False) -> None:
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        head = json.dumps(self._head)[:-1]
        usage = '"usage": null, ' if include_usage else ""
        self._before = f'data: {head}, {usage}"choices": [{{"index": '
        self._usage_before = f'data: {head}, "choices": [], "usage": '

    def chunks(self, delta: Delta) -> str:
        """One choice's news as a server-sent event."""
        logprobs = json.dumps(self._logprobs(delta)) if self._with_logprobs else "null"
        finish_reason = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
        return (
            f'{self._before}{delta.index}, "text": {json.dumps(delta.text)}, "logprobs": {logprobs}, '
            f'"finish_reason": {finish_reason}}}]}}\n\n'
        )

    def usage_chunk(self, usage: Usage) -> str:
        return f"{self._usage_before}{json.dumps(usage_object(usage))}}}\n\n"

    def whole(self, choices: list[Delta], usage: Usage) -> dict[str, Any]:
        """choices: each choice's deltas joined into one."""
        return self._head | {
            "choices": [
                {
                    "index": choice.index,
                    "text": choice.text,
                    "logprobs": self._logprobs(choice) if self._with_logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for choice in choices
            ],
            "usage": usage_object(usage),
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any]:
        return completion_logprobs(delta.logprobs, self._tokenizer)
