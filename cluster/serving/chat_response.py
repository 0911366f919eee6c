"""/v1/chat/completions, outgoing: the whole object, or its chunks."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from cluster.serving.generation import Delta, Usage
from cluster.serving.logprobs import chat_logprobs
from cluster.serving.response import usage_object
from cluster.serving.tokenizer import Tokenizer


class ChatResponse:
    """Of one request. The parts that are the same in every chunk are rendered once."""

    def __init__(self, *, model: str, tokenizer: Tokenizer, with_logprobs: bool, include_usage: bool = False) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs
        head = json.dumps(self._head | {"object": "chat.completion.chunk"})[:-1]
        usage = '"usage": null, ' if include_usage else ""
        self._before = f'data: {head}, {usage}"choices": [{{"index": '
        self._usage_before = f'data: {head}, "choices": [], "usage": '
        self._begun: set[int] = set()

    def chunks(self, delta: Delta) -> str:
        """One choice's news as server-sent events. The first names the role, the last why it ended."""
        events = ""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            events = self._chunk(delta.index, '{"role": "assistant", "content": ""}', "null", "null")
        if delta.text or delta.logprobs:
            events += self._chunk(
                delta.index, f'{{"content": {json.dumps(delta.text)}}}', self._logprobs(delta), "null"
            )
        if delta.finish_reason is not None:
            events += self._chunk(delta.index, "{}", "null", f'"{delta.finish_reason}"')
        return events

    def usage_chunk(self, usage: Usage) -> str:
        return f"{self._usage_before}{json.dumps(usage_object(usage))}}}\n\n"

    def whole(self, choices: list[Delta], usage: Usage) -> dict[str, Any]:
        """choices: each choice's deltas joined into one."""
        return self._head | {
            "object": "chat.completion",
            "choices": [
                {
                    "index": choice.index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": chat_logprobs(choice.logprobs, self._tokenizer) if self._with_logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for choice in choices
            ],
            "usage": usage_object(usage),
        }

    def _chunk(self, index: int, delta: str, logprobs: str, finish_reason: str) -> str:
        end = f'"logprobs": {logprobs}, "finish_reason": {finish_reason}}}]}}\n\n'
        return f'{self._before}{index}, "delta": {delta}, {end}'

    def _logprobs(self, delta: Delta) -> str:
        return json.dumps(chat_logprobs(delta.logprobs, self._tokenizer)) if self._with_logprobs else "null"
