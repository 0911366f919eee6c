"""From a request to the token ids that the engine gets, with every reason to refuse a prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from cluster.serving.api_errors import ApiError, context_length_exceeded
from cluster.serving.protocol import ChatCompletionRequest, CompletionRequest
from cluster.serving.tokenizer import Tokenizer

# Texts up to this length are tokenised in place (under 10 ms); longer ones in a thread: streams go on.
_INLINE_CHARACTERS = 16_384

ResultT = TypeVar("ResultT")


class PromptEncoder:
    """Checks prompts against one engine: its vocabulary, its context less one token of output, its room.

    max_sequences: most that a request may ask for; with more it would find the queue full for ever
    """

    def __init__(self, tokenizer: Tokenizer, *, max_model_len: int, vocab_size: int, max_sequences: int) -> None:
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._max_sequences = max_sequences

    async def encode_chat(self, request: ChatCompletionRequest) -> list[int]:
        """The conversation's token ids. Raises ApiError, RequestError."""
        self._check_count(request.n or 1, "n")
        if request.continue_final_message and request.add_generation_prompt:
            raise ApiError(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )

        def encode() -> list[int]:
            text = self._tokenizer.render_chat(
                [message.for_template() for message in request.messages],
                add_generation_prompt=not request.continue_final_message and request.add_generation_prompt is not False,
                continue_final_message=bool(request.continue_final_message),
                template_kwargs=request.chat_template_kwargs,
            )
            return self._encode_text(text, "messages", add_special_tokens=bool(request.add_special_tokens))

        return await _run(encode, num_characters=sum(len(message.content) for message in request.messages))

    async def encode_completion(self, request: CompletionRequest) -> list[list[int]]:
        """The token ids of every prompt. Raises ApiError."""
        prompts = _as_list(request.prompt)
        self._check_count(len(prompts) * (request.n or 1), "n" if len(prompts) == 1 else "prompt")

        def encode() -> list[list[int]]:
            names = ["prompt"] if len(prompts) == 1 else [f"prompt[{index}]" for index in range(len(prompts))]
            add_special_tokens = request.add_special_tokens is not False
            return [
                self._encode_text(prompt, name, add_special_tokens=add_special_tokens)
                if isinstance(prompt, str)
                else self._check_ids(prompt, name)
                for prompt, name in zip(prompts, names, strict=True)
            ]

        return await _run(encode, num_characters=sum(map(len, prompts)))

    def check_stop_tokens(self, token_ids: list[int] | None) -> None:
        for token_id in token_ids or ():
            if not 0 <= token_id < self._vocab_size:
                raise self._unknown_token("stop_token_ids", token_id)

    def room_for_output(self, prompt_ids: list[int]) -> int:
        return self._max_model_len - len(prompt_ids)

    def _check_count(self, num_sequences: int, param: str) -> None:
        if num_sequences > self._max_sequences:
            raise ApiError(
                f"the request asks for {num_sequences} sequences (prompts times n), this server takes "
                f"{self._max_sequences} at once: ask for fewer",
                param=param,
            )

    def _encode_text(self, text: str, name: str, *, add_special_tokens: bool) -> list[int]:
        if not text:
            raise ApiError(f"{name} is empty: give the model at least one character", param=name)
        longest = self._tokenizer.max_token_bytes
        if longest is not None and (at_least := len(text.encode()) // longest) >= self._max_model_len:
            raise self._too_long(name, f"at least {at_least}")
        token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self._check_ids(token_ids, name)

    def _check_ids(self, token_ids: list[int], name: str) -> list[int]:
        if not token_ids:
            raise ApiError(f"{name} is empty: give the model at least one token", param=name)
        if len(token_ids) >= self._max_model_len:
            raise self._too_long(name, str(len(token_ids)))
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            index, unknown = next(
                (index, token_id) for index, token_id in enumerate(token_ids) if not 0 <= token_id < self._vocab_size
            )
            raise self._unknown_token(f"{name}[{index}]", unknown)
        return token_ids

    def _too_long(self, name: str, num_tokens: str) -> ApiError:
        return context_length_exceeded(
            f"{name} has {num_tokens} tokens; this model's context is {self._max_model_len} tokens, one of "
            "which the output needs: shorten it",
            param=name,
        )

    def _unknown_token(self, name: str, token_id: int) -> ApiError:
        digits = str(token_id)
        shown = digits if len(digits) <= 24 else f"{digits[:20]}..."
        return ApiError(f"{name}: no token has id {shown}, ids go from 0 to {self._vocab_size - 1}", param=name)


def _as_list(prompt: Any) -> list[str | list[int]]:
    """OpenAI's four shapes (text, texts, token ids, lists of them) as a list of prompts."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise ApiError(
            "prompt should be a string, a list of strings, or token ids (one list or several)", param="prompt"
        )
    if not prompt:
        raise ApiError("prompt is an empty list", param="prompt")
    if all(type(item) is int for item in prompt):
        return [prompt]
    if all(isinstance(item, str) for item in prompt):
        return prompt
    for index, item in enumerate(prompt):
        if not isinstance(item, list) or not all(type(token_id) is int for token_id in item):
            raise ApiError(
                f"prompt[{index}] should be a list of token ids: a prompt is all strings, all integers or "
                "all lists of integers",
                param=f"prompt[{index}]",
            )
    return prompt


async def _run(encode: Callable[[], ResultT], *, num_characters: int) -> ResultT:
    return encode() if num_characters <= _INLINE_CHARACTERS else await asyncio.to_thread(encode)
