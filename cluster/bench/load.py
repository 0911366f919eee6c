"""The one load generator of the serving benchmark: streamed completions over HTTP, timed token by token."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np

from experts.errors import MeshError

REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestTiming:
    """One request, in seconds of one monotonic clock.

    sent:        when it was sent
    token_times: when each piece of the stream arrived, ascending; a piece is a token unless a server joins some
    num_tokens:  how many tokens the server says it made
    """

    sent: float
    token_times: tuple[float, ...]
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Figures of one wave of requests; times in milliseconds."""

    output_tokens_per_s: float
    ttft_ms_p50: float
    itl_ms_p50: float
    itl_ms_p99: float
    e2e_ms_p50: float


def build_prompts(count: int, length: int, *, vocab_size: int, seed: int) -> list[list[int]]:
    """`count` different random prompts of token ids; different, so that no server's prefix cache helps it.

    Ids below 4 are left out: there lie the special tokens.
    """
    rng = random.Random(seed)
    return [[rng.randrange(4, vocab_size) for _ in range(length)] for _ in range(count)]


def summarise(timings: Sequence[RequestTiming]) -> Measurement:
    """Throughput over the wall time of all requests, percentiles over requests (gaps between pieces: over gaps)."""
    assert timings
    wall_s = max(t.token_times[-1] for t in timings) - min(t.sent for t in timings)
    first = [t.token_times[0] - t.sent for t in timings]
    gaps = np.concatenate([np.diff(t.token_times) for t in timings])
    whole = [t.token_times[-1] - t.sent for t in timings]
    return Measurement(
        output_tokens_per_s=sum(t.num_tokens for t in timings) / wall_s,
        ttft_ms_p50=float(np.median(first)) * 1e3,
        itl_ms_p50=float(np.percentile(gaps, 50)) * 1e3 if len(gaps) else 0.0,
        itl_ms_p99=float(np.percentile(gaps, 99)) * 1e3 if len(gaps) else 0.0,
        e2e_ms_p50=float(np.median(whole)) * 1e3,
    )


async def send_load(
    base_url: str, prompts: Sequence[Sequence[int]], *, max_tokens: int, streams: int
) -> list[RequestTiming]:
    """Sends all `prompts`, `streams` at a time, greedy and to full length.

    aiohttp, as in `vllm bench serve`: the client is on the servers' own cores, and this one leaves most of them.
    Raises MeshError if the server answers with an error, breaks off or makes fewer tokens than asked.
    """
    try:
        return await _send_load(base_url.rstrip("/"), prompts, max_tokens=max_tokens, streams=streams)
    except (aiohttp.ClientError, TimeoutError) as failure:
        raise MeshError(f"{base_url}: {failure!r}") from failure
    except (UnicodeDecodeError, json.JSONDecodeError, LookupError, TypeError) as failure:
        raise MeshError(f"{base_url} answered what no OpenAI server would: {failure!r}") from failure


async def _send_load(
    base_url: str, prompts: Sequence[Sequence[int]], *, max_tokens: int, streams: int
) -> list[RequestTiming]:
    slots = asyncio.Semaphore(streams)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S),
    ) as client:
        async with client.get(f"{base_url}/v1/models") as response:
            await _check_status(response)
            model = json.loads(await response.read())["data"][0]["id"]

        async def one(prompt: Sequence[int]) -> RequestTiming:
            async with slots:
                return await _stream(client, base_url, model, prompt, max_tokens)

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


async def _stream(
    client: aiohttp.ClientSession, base_url: str, model: str, prompt: Sequence[int], max_tokens: int
) -> RequestTiming:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    token_times: list[float] = []
    num_tokens = 0
    sent = time.perf_counter()
    async with client.post(f"{base_url}/v1/completions", json=body) as response:
        await _check_status(response)
        async for arrived, data in _events(response):
            if data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise MeshError(f"{response.url} ended a stream with an error: {event['error']}")
            if any(choice.get("text") for choice in event["choices"]):
                token_times.append(arrived)
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
    if num_tokens != max_tokens or not token_times:
        raise MeshError(f"{base_url} made {num_tokens} tokens where {max_tokens} were asked with ignore_eos")
    return RequestTiming(sent=sent, token_times=tuple(token_times), num_tokens=num_tokens)


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        text = (await response.read()).decode(errors="replace")
        raise MeshError(f"{response.url} answered {response.status}: {text[:500]}")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    """When each server-sent event's data arrived, and what it is."""
    rest = b""
    async for part in response.content.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line.removeprefix(b"data:").strip()
    if rest.startswith(b"data:"):
        yield time.perf_counter(), rest.removeprefix(b"data:").strip()
