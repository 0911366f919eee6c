"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.serving.text_stream import PlacedLogprob
from cluster.serving.tokenizer import Tokenizer

# JSON has no -inf; OpenAI's and vLLM's stand-in for a token that could not be chosen.
_LEAST = -9999.0


def token_name(token_bytes: bytes) -> str:
    """A token as text; part of a character as its bytes, so that different tokens have different names."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def chat_logprobs(placed: Iterable[PlacedLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/chat/completions."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token_bytes = tokenizer.token_bytes(token_id)
        return {"token": token_name(token_bytes), "logprob": max(logprob, _LEAST), "bytes": list(token_bytes)}

    content = [
        entry(item.logprob.token_id, item.logprob.logprob)
        | {"top_logprobs": [entry(token_id, logprob) for token_id, logprob in item.logprob.top]}
        for item in placed
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(placed: Iterable[PlacedLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/completions. The chosen token is always among the top ones."""
    shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for item in placed:
        chosen = item.logprob
        candidates = dict(chosen.top) | {chosen.token_id: chosen.logprob}
        shape["tokens"].append(token_name(tokenizer.token_bytes(chosen.token_id)))
        shape["token_logprobs"].append(max(chosen.logprob, _LEAST))
        shape["top_logprobs"].append(
            {
                token_name(tokenizer.token_bytes(token_id)): max(logprob, _LEAST)
                for token_id, logprob in candidates.items()
            }
        )
        shape["text_offset"].append(item.text_offset)
    return shape
