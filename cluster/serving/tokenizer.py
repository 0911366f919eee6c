"""A checkpoint's tokenizer: text to token ids and back, and its chat template."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import decoders, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.serving.detokenizer import ByteLevelDetokenizer, Detokenizer, WindowDetokenizer
from experts.errors import CheckpointError, RequestError

# What `apply_chat_template` takes for itself: a request has fields of its own for them, or must not set them.
_TEMPLATE_ARGUMENTS = {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `directory`. Its code, if it brings any, is not run.

    Raises CheckpointError where there is none that the `tokenizers` library can run.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"no usable tokenizer in {directory}: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer in {directory} ({type(tokenizer).__name__}) has no tokenizer.json and cannot be "
            "converted; save one beside the checkpoint"
        )
    return Tokenizer(tokenizer)


class Tokenizer:
    """Thread-safe: nothing here changes after construction."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._chat = tokenizer
        self._tokens = tokenizer.backend_tokenizer
        self._is_byte_level = isinstance(self._tokens.decoder, decoders.ByteLevel)
        added = self._tokens.get_added_tokens_decoder()
        self._added: dict[int, str] = {token_id: token.content for token_id, token in added.items()}
        self._special: frozenset[int] = frozenset(token_id for token_id, token in added.items() if token.special)
        self._byte_of_char = _byte_of_char()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(self._tokens.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self._tokens.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, *, skip_special_tokens: bool) -> Detokenizer:
        """A fresh one for one sequence."""
        if self._is_byte_level:
            skipped = self._special if skip_special_tokens else frozenset()
            return ByteLevelDetokenizer(lambda token_id: b"" if token_id in skipped else self.token_bytes(token_id))
        return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for by itself; empty for an id without a token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        if not self._is_byte_level:
            return self.decode([token_id]).encode()
        token = self._tokens.id_to_token(token_id)
        return bytes(map(self._byte_of_char.__getitem__, token)) if token is not None else b""

    @cached_property
    def max_token_bytes(self) -> int | None:
        """No token covers more bytes of a text; None where the tokenizer drops or rewrites text first."""
        if not self._is_byte_level or self._tokens.normalizer is not None:
            return None
        longest = max(map(len, self._tokens.get_vocab(with_added_tokens=False)), default=1)
        return max(longest, *(len(content.encode()) for content in self._added.values()), 1)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as the model's chat template writes it. Raises RequestError naming the field."""
        if self._chat.chat_template is None:
            raise RequestError(
                "this model's tokenizer has no chat template: send the whole prompt to /v1/completions",
                field="messages",
            )
        if taken := _TEMPLATE_ARGUMENTS & set(template_kwargs or ()):
            message = f"chat_template_kwargs cannot set {min(taken)!r}: leave it out"
            raise RequestError(message, field="chat_template_kwargs")
        try:
            return str(
                self._chat.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **(template_kwargs or {}),
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            # A template is a program over what the caller wrote: what it cannot take is the caller's to mend.
            message = f"the model's chat template refused these messages: {error}"
            raise RequestError(message, field="messages") from error


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet of bytes: printable ones as themselves, the others in order from U+0100 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    themselves = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = sorted(set(range(256)) - set(themselves.values()))
    return themselves | {chr(256 + index): byte for index, byte in enumerate(others)}
