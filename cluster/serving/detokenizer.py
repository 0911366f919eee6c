"""Token ids to text, one token at a time.

The pieces joined are the text of all tokens decoded together; a character whose bytes are spread over several
tokens comes out when its last byte has arrived, never as a premature U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

# Past so many tokens without a clean end the bytes are no text, and waiting for more would not help.
_MAX_HELD_TOKENS = 16


class Detokenizer(Protocol):
    """Decodes the tokens of one sequence."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often its own, empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What an incomplete character at the end of the sequence reads as."""
        ...


class ByteLevelDetokenizer:
    """For tokenizers whose every token is a string of bytes (byte-level BPE)."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDetokenizer:
    """For every other tokenizer: a token's text depends on its neighbours (spaces, byte fallback).

    Decodes the tokens since the last clean cut along with those of the piece before, and takes what is new.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_seen = 0  # ids[:num_seen] are out already and stay as context
        self._seen = ""  # their text

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        num_held = len(self._ids) - self._num_seen
        if len(text) <= len(self._seen) or (text.endswith("\ufffd") and num_held < _MAX_HELD_TOKENS):
            return ""
        return self._cut(text)

    def flush(self) -> str:
        return self._cut(self._decode(self._ids))

    def _cut(self, text: str) -> str:
        piece = text[len(self._seen) :]
        del self._ids[: self._num_seen]
        self._num_seen = len(self._ids)
        self._seen = self._decode(self._ids)
        return piece
