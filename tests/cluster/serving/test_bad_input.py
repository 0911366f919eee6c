"""Every wrong request gets a 4xx of OpenAI's shape that names the field, and the server serves on."""

from __future__ import annotations

import json
import socket

import httpx
import pytest
from openai.types.shared import ErrorObject

from cluster.serving.health import Health
from cluster.serving.openai_api import create_app
from cluster.serving.tokenizer import load_tokenizer

MODEL = "org/scripted"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": MODEL, "prompt": "hi"}


def error_of(response: httpx.Response) -> ErrorObject:
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return ErrorObject.model_validate(response.json()["error"], strict=True)


def assert_serves(api) -> None:
    for path, body in (("chat/completions", CHAT), ("completions", COMPLETION)):
        assert api.http.post(f"/v1/{path}", json=body).status_code == 200
    assert not api.engine.live


BOTH = [
    ("temperature", "hot", "temperature", "number"),
    ("temperature", 2.5, "temperature", "less than or equal to 2"),
    ("temperature", -0.1, "temperature", "greater than or equal to 0"),
    ("top_p", 0, "top_p", "greater than 0"),
    ("top_p", 1.5, "top_p", "less than or equal to 1"),
    ("top_k", -2, "top_k", "-2"),
    ("top_k", 1.5, "top_k", "integer"),
    ("min_p", 2, "min_p", "2"),
    ("max_tokens", -1, "max_tokens", "-1"),
    ("max_tokens", 0, "max_tokens", "0"),
    ("max_tokens", 1.5, "max_tokens", "integer"),
    ("max_tokens", "10", "max_tokens", "integer"),
    ("max_tokens", True, "max_tokens", "integer"),
    ("n", 0, "n", "0"),
    ("n", 129, "n", "128"),
    ("n", 65, "n", "takes 64 at once"),
    ("n", [1], "n", "integer"),
    ("seed", 2**63, "seed", "less than"),
    ("seed", "x", "seed", "integer"),
    ("stop", ["a", "b", "c", "d", "e"], "stop", "at most 4"),
    ("stop", ["a", 1], "stop", "string"),
    ("stop", "", "stop", "empty"),
    ("stop", {"a": 1}, "stop", "string"),
    ("stop_token_ids", [1, 340], "stop_token_ids", "340"),
    ("stop_token_ids", [-1], "stop_token_ids", "-1"),
    ("stop_token_ids", ["a"], "stop_token_ids[0]", "integer"),
    ("min_tokens", -1, "min_tokens", "-1"),
    ("presence_penalty", 3, "presence_penalty", "2"),
    ("frequency_penalty", -3, "frequency_penalty", "-2"),
    ("stream", "yes", "stream", "boolean"),
    ("stream", 1, "stream", "boolean"),
    ("stream_options", {"include_usage": True}, "stream_options", "stream: true"),
    ("stream_options", [], "stream_options", "object"),
    ("model", None, "model", "string"),
    ("model", 7, "model", "string"),
    ("ignore_eos", 1, "ignore_eos", "boolean"),
    ("logit_bias", {"5": 100}, "logit_bias", "not supported"),
    ("response_format", {"type": "json_object"}, "response_format", "not supported"),
    ("repetition_penalty", 1.2, "repetition_penalty", "not supported"),
    ("temprature", 1, "temprature", "did you mean 'temperature'"),
    ("zzzzzz", 1, "zzzzzz", "unknown field"),
]
CHAT_ONLY = [
    ("messages", [], "messages", "at least 1"),
    ("messages", None, "messages", "array, got null"),
    ("messages", "hi", "messages", "array"),
    ("messages", ["hi"], "messages[0]", "object"),
    ("messages", [{"role": "user"}], "messages[0].content", "required"),
    ("messages", [{"role": "user", "content": None}], "messages[0].content", "string"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content", "string"),
    ("messages", [{"role": "king", "content": "x"}], "messages[0].role", "'user'"),
    ("messages", [{"role": "tool", "content": "x"}], "messages", "no tools here"),
    ("messages", [{"role": "user", "content": "x", "tool_calls": [1]}], "messages[0]", "tool_calls"),
    ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content", "image_url"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content", "part 0"),
    ("messages", [{"role": "user", "content": ["x"]}], "messages[0].content", "part 0"),
    ("messages", [{"role": "user", "content": "word " * 1000}], "messages", "context"),
    ("tools", [{"type": "function"}], "tools", "not supported"),
    ("tool_choice", "required", "tool_choice", "not supported"),
    ("top_logprobs", 2, "top_logprobs", "logprobs: true"),
    ("logprobs", 3, "logprobs", "boolean"),
    ("max_completion_tokens", -5, "max_completion_tokens", "-5"),
    ("prompt", "hi", "prompt", "unknown field"),
    ("chat_template_kwargs", {"tokenize": True}, "chat_template_kwargs", "tokenize"),
    ("chat_template", "{{ 1 }}", "chat_template", "not supported"),
]
COMPLETION_ONLY = [
    ("prompt", "", "prompt", "empty"),
    ("prompt", [], "prompt", "empty"),
    ("prompt", [[]], "prompt", "empty"),
    ("prompt", ["hi", ""], "prompt[1]", "empty"),
    ("prompt", [[1], []], "prompt[1]", "empty"),
    ("prompt", None, "prompt", "string"),
    ("prompt", {"a": 1}, "prompt", "string"),
    ("prompt", 5, "prompt", "string"),
    ("prompt", ["hi", 5], "prompt[0]", "token ids"),
    ("prompt", [1, True], "prompt[0]", "token ids"),
    ("prompt", [[1], [1.5]], "prompt[1]", "token ids"),
    ("prompt", [1, 2, 340], "prompt[2]", "340"),
    ("prompt", [1, -1], "prompt[1]", "-1"),
    ("prompt", [[1], [7, 10**30]], "prompt[1][1]", "1000000"),
    ("prompt", [1] * 256, "prompt", "256"),
    ("prompt", "word " * 1000, "prompt", "context"),
    ("prompt", ["x"] * 3000, "prompt", "takes 64 at once"),
    ("best_of", 3, "best_of", "not supported"),
    ("suffix", "tail", "suffix", "not supported"),
    ("logprobs", 21, "logprobs", "20"),
    ("logprobs", True, "logprobs", "integer"),
    ("echo", "yes", "echo", "boolean"),
    ("messages", [], "messages", "unknown field"),
]


@pytest.mark.parametrize(
    ("path", "valid", "field", "value", "param", "says"),
    [("chat/completions", CHAT, *case) for case in (*BOTH, *CHAT_ONLY)]
    + [("completions", COMPLETION, *case) for case in (*BOTH, *COMPLETION_ONLY)],
)
def test_a_wrong_field_is_named(shared_api, path: str, valid: dict, field: str, value, param: str, says: str) -> None:
    response = shared_api.http.post(f"/v1/{path}", json=valid | {field: value})
    assert response.status_code == 400
    error = error_of(response)
    assert error.type == "invalid_request_error"
    assert error.param == param
    assert says in error.message
    assert not shared_api.engine.live


def test_what_is_too_long_says_so_in_its_code(shared_api) -> None:
    for path, body in (
        ("completions", COMPLETION | {"prompt": [1] * 256}),
        ("completions", COMPLETION | {"prompt": "word " * 200_000}),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "x y " * 300}]}),
    ):
        error = error_of(shared_api.http.post(f"/v1/{path}", json=body))
        assert error.code == "context_length_exceeded"
        assert "256 tokens" in error.message


def test_fields_that_exclude_each_other(shared_api) -> None:
    for path, body, param in (
        ("completions", COMPLETION | {"echo": True, "logprobs": 1}, "logprobs"),
        ("completions", COMPLETION | {"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ("chat/completions", CHAT | {"continue_final_message": True, "add_generation_prompt": True}, None),
        ("chat/completions", CHAT | {"min_tokens": 20, "max_completion_tokens": 10}, "min_tokens"),
    ):
        response = shared_api.http.post(f"/v1/{path}", json=body)
        assert response.status_code == 400
        assert error_of(response).param == (param or "continue_final_message")


def test_best_of_that_asks_for_nothing_is_accepted(shared_api) -> None:
    assert shared_api.http.post("/v1/completions", json=COMPLETION | {"best_of": 1}).status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"model": "org/scripted", "prompt": "hi"',
        b'{"model": "org/scripted", "prompt": "hi"}}',
        b'{"model": "org/scripted", "prompt": "\xff\xfe"}',
        b'{"model": "org/scripted", "prompt": "\\ud800"}',
        b'{"model": "org/scripted", "prompt": "hi", "temperature": NaN}',
        b'{"model": "org/scripted", "prompt": "hi", "temperature": Infinity}',
        b'{"model": "org/scripted", "prompt": "hi", "temperature": 1e999}',
        b'{"model": "org/scripted", "prompt": "hi", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "org/scripted", "prompt": [' + b"9" * 4000 + b"]}",
        b'{"model": "org/scripted", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        '{"model": "org/scripted", "prompt": "hi"}'.encode("utf-16"),
        b"\x1f\x8b\x08\x00",
        b"[]",
        b'"prompt"',
        b"null",
        b"{}",
    ],
    ids=lambda body: repr(body[:40]),
)
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_body_that_is_no_request(shared_api, path: str, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = shared_api.http.post(f"/v1/{path}", content=body, headers=headers)
    assert response.status_code == 400
    assert error_of(response).message


def test_an_unknown_model(shared_api) -> None:
    for path, body in (("completions", COMPLETION), ("chat/completions", CHAT)):
        response = shared_api.http.post(f"/v1/{path}", json=body | {"model": "gpt-9"})
        assert response.status_code == 404
        error = error_of(response)
        assert (error.code, error.param) == ("model_not_found", "model")
        assert MODEL in error.message


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("PUT", "/health", 405),
    ],
)
def test_a_wrong_path_or_method(shared_api, method: str, path: str, status: int) -> None:
    response = shared_api.http.request(method, path)
    assert response.status_code == status
    assert error_of(response).message.startswith(f"{method} {path}")


@pytest.mark.parametrize("size", [10_000_000, 100_000_000])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_body_over_the_limit(api, path: str, size: int) -> None:
    prompt = "x" * size
    body = (
        COMPLETION | {"prompt": prompt}
        if path == "completions"
        else CHAT | {"messages": [{"role": "user", "content": prompt}]}
    )
    response = api.http.post(f"/v1/{path}", json=body)
    assert response.status_code == 413
    assert error_of(response).code == "request_too_large"
    assert_serves(api)


def test_a_prompt_just_under_the_body_limit(api) -> None:
    for prompt in ("x " * 4_000_000, [1] * 2_500_000, ["x"] * 1_500_000):
        response = api.http.post("/v1/completions", json=COMPLETION | {"prompt": prompt})
        assert response.status_code == 400
    assert_serves(api)


def test_a_client_that_leaves_before_its_body_is_there(api) -> None:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert_serves(api)


def test_a_model_without_chat_template(scripted_engine, tokenizer_dir, tmp_path, serve) -> None:
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    app = create_app(scripted_engine, load_tokenizer(tmp_path), model_name=MODEL, health=Health)
    url = serve(app)
    response = httpx.post(f"{url}/v1/chat/completions", json=CHAT)
    assert response.status_code == 400
    assert "no chat template" in error_of(response).message
    assert httpx.post(f"{url}/v1/completions", json=COMPLETION).status_code == 200
