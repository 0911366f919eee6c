"""Request fields that we do not have: which are accepted, and what is said about the others."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from cluster.serving.api_errors import ApiError, brief

# Of OpenAI's and vLLM's fields, those that cannot change the text.
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
    "request_id",
    "priority",
}
# Fields that change the output and that we do not have, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "repetition_penalty": (1, 1.0),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "chat_template": (),
}


def check_foreign_field(name: str, value: Any, *, known: Iterable[str]) -> None:
    """Raises ApiError (400) where `name` asks for what we would not do. known: the fields that we have."""
    if value is None or name in _HARMLESS:
        return
    if name in _UNSUPPORTED:
        if any(type(value) is type(neutral) and value == neutral for neutral in _UNSUPPORTED[name]):
            return
        raise ApiError(
            f"{name} is not supported by this server: leave it out", param=name, code="unsupported_parameter"
        )
    near = difflib.get_close_matches(name[:64], known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ApiError(f"unknown field {brief(name)}{hint}", param=name[:64], code="unknown_parameter")
