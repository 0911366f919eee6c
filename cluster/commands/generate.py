"""`expertmesh generate`: a prompt in, the completion as it comes, from a running server."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import httpx
import typer

from experts.errors import ConfigError, RequestError


def command(
    prompt: Annotated[str, typer.Argument(help="Text to continue; with --chat, the user's message")],
    url: Annotated[str, typer.Option(help="Where the server listens")] = "http://127.0.0.1:8000",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template")] = False,
    api_key_env: Annotated[str, typer.Option(help="Environment variable that holds the API key")] = "OPENAI_API_KEY",
) -> None:
    """Complete a prompt with a running server."""
    body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "stream": True}
    body |= {"seed": seed} if seed is not None else {}
    body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise ConfigError("PROMPT: not UTF-8 text; the server takes no other") from None
    with _client(url, api_key_env) as client:
        for text in stream_completion(client, body, chat=chat):
            typer.echo(text, nl=False)
    typer.echo()


def _client(url: str, api_key_env: str) -> httpx.Client:
    key = os.environ.get(api_key_env, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{api_key_env}: this environment variable holds no API key: keys are printable ASCII text")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(10, read=None))
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"--url {url}: {error}; give one such as http://127.0.0.1:8000") from None


def stream_completion(client: httpx.Client, body: dict[str, Any], *, chat: bool = False) -> Any:
    """Yield pieces of text of one streamed completion; the model is the server's own unless `body` names one.

    Raises ConfigError where nothing listens, RequestError with the server's own words where it refuses.
    """
    try:
        if "model" not in body:
            body = {"model": _served_model(client.get("/v1/models")), **body}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                _answer(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RequestError(f"the server failed: {event['error']['message']}")
                for choice in event["choices"]:
                    yield (choice["delta"].get("content") or "") if chat else choice["text"]
    except httpx.RequestError as error:
        raise ConfigError(f"{client.base_url}: no answer ({error}); is `expertmesh serve` running there?") from None


def _served_model(response: httpx.Response) -> str:
    document = _answer(response)
    try:
        return str(document["data"][0]["id"])
    except (LookupError, TypeError):
        raise RequestError(f"{response.url}: names no model; is it an OpenAI-compatible server?") from None


def _answer(response: httpx.Response) -> Any:
    try:
        document = response.json()
    except ValueError:
        raise RequestError(f"{response.url}: HTTP {response.status_code}, not an OpenAI-compatible server") from None
    if response.status_code != 200:
        message = document.get("error", {}).get("message", document) if isinstance(document, dict) else document
        raise RequestError(f"{response.url}: HTTP {response.status_code}: {message}")
    return document
