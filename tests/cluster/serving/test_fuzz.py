"""Random requests: never a 500, never a hang, always a body of OpenAI's types, and nothing left running."""

from __future__ import annotations

import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

from cluster.serving.protocol import ChatCompletionRequest, CompletionRequest

MODEL = "org/scripted"
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 400),
    st.floats(),
    st.floats(0, 2),
    st.text(max_size=20),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)
TOKENS = st.lists(st.integers(-1, 345), max_size=6)
PROMPTS = st.one_of(JSON, st.text(max_size=40), st.lists(st.text(max_size=9), max_size=4), TOKENS, st.lists(TOKENS))
MESSAGES = st.one_of(
    JSON,
    st.lists(
        st.fixed_dictionaries(
            {
                "role": st.sampled_from(["user", "assistant", "system", "tool", "x"]),
                "content": st.text() | JSON,
            },
            optional={"name": JSON, "tool_calls": JSON, "refusal": JSON},
        ),
        max_size=3,
    ),
)
# Mostly what passes, so that the deeper code is reached too.
SENSIBLE = {
    "stream": st.booleans(),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 20),
    "temperature": st.floats(0, 2),
    "stop": st.text(max_size=3) | st.lists(st.text(min_size=1, max_size=3), max_size=4),
    "logprobs": st.booleans() | st.integers(0, 5),
    "echo": st.booleans(),
    "stop_token_ids": TOKENS,
    "seed": st.integers(-(2**63), 2**63 - 1),
    "skip_special_tokens": st.booleans(),
    "stream_options": st.fixed_dictionaries({"include_usage": st.booleans()}),
}


def bodies(kind: type, required: dict[str, st.SearchStrategy]) -> st.SearchStrategy[dict]:
    optional = {name: SENSIBLE.get(name, JSON) | JSON for name in kind.model_fields if name not in required}
    few = st.dictionaries(st.text(max_size=6), JSON, max_size=1)
    sensible = {name: strategy for name, strategy in SENSIBLE.items() if name in kind.model_fields}
    return st.one_of(
        st.fixed_dictionaries(required, optional=sensible),
        st.fixed_dictionaries(required, optional=optional),
        st.tuples(st.fixed_dictionaries(required, optional=optional), few).map(lambda both: both[0] | both[1]),
    )


MODELS = st.just(MODEL)
COMPLETIONS = bodies(CompletionRequest, {"model": MODELS, "prompt": PROMPTS})
CHATS = bodies(ChatCompletionRequest, {"model": MODELS, "messages": MESSAGES})


def check(response: httpx.Response, kind: type[Completion] | type[ChatCompletion]) -> None:
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, response.text
        ErrorObject.model_validate(response.json()["error"], strict=True)
    elif response.headers["content-type"] == "application/json":
        kind.model_validate_json(response.content, strict=True)
    else:
        assert response.text.endswith("data: [DONE]\n\n")


def fuzz(api, path: str, body: bytes, kind: type[Completion] | type[ChatCompletion]) -> None:
    text = "the quick 🙂 brown fox\n" * 3
    api.engine.answer = lambda prompt_ids, params: api.tokenizer.encode(text, add_special_tokens=False)
    check(api.http.post(path, content=body), kind)
    api.engine.wait_for(lambda: not api.engine.live)


RUNS = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@RUNS
@given(body=COMPLETIONS)
def test_completions(shared_api, body: dict) -> None:
    fuzz(shared_api, "/v1/completions", json.dumps(body).encode(), Completion)


@RUNS
@given(body=CHATS)
def test_chat_completions(shared_api, body: dict) -> None:
    fuzz(shared_api, "/v1/chat/completions", json.dumps(body).encode(), ChatCompletion)


@RUNS
@given(body=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_any_bytes(shared_api, path: str, body: bytes) -> None:
    fuzz(shared_api, path, body, Completion)
