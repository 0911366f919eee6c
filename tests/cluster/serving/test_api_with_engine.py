"""The API in front of the real engine: what the text says are the tokens that transformers generates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi import FastAPI

from cluster.serving.engine import Engine
from cluster.serving.health import Health
from cluster.serving.openai_api import create_app
from cluster.serving.skeleton import ModelSkeleton
from cluster.serving.tokenizer import Tokenizer, load_tokenizer

MODEL = "tiny"
FAMILY = "deepseek_v3"
MESSAGES = [{"role": "user", "content": "What do tokens read like? 🙂"}]
LIMITS: dict[str, int] = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 2048,
    "kv_cache_memory": 1 << 25,
    "max_queue_len": 16,
}


@pytest.fixture(scope="module")
def tiny_tokenizer(tiny_checkpoint: Callable[[str], Path]) -> Tokenizer:
    return load_tokenizer(tiny_checkpoint(FAMILY))


@pytest.fixture(scope="module")
def parts(connected_skeleton: Callable[[str], tuple[ModelSkeleton, Any]]) -> tuple[ModelSkeleton, Any]:
    return connected_skeleton(FAMILY)


@pytest.fixture
def start(
    parts: tuple[ModelSkeleton, Any], tiny_tokenizer: Tokenizer, serve: Callable[[FastAPI], str]
) -> Callable[..., Any]:
    """A context manager: an engine with other limits, and its URL."""

    @contextmanager
    def running(**limits: int) -> Iterator[tuple[Engine, str]]:
        engine = Engine(parts[0], **{**LIMITS, **limits})
        engine.start()
        try:
            yield engine, serve(create_app(engine, tiny_tokenizer, model_name=MODEL, health=Health))
        finally:
            engine.stop()

    return running


def generated(reference: Any, tokenizer: Tokenizer, num_tokens: int) -> list[int]:
    prompt = tokenizer.render_chat(MESSAGES)
    prompt_ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
    with torch.inference_mode():
        output = reference.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, prompt_ids.shape[1] :].tolist()


def test_text_and_logprobs_are_those_of_generate(
    start: Callable[..., Any], parts: tuple[ModelSkeleton, Any], tiny_tokenizer: Tokenizer
) -> None:
    token_ids = generated(parts[1], tiny_tokenizer, 24)
    text = tiny_tokenizer.decode(token_ids, skip_special_tokens=True)
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 24}
    with start() as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        extra = {"ignore_eos": True}
        whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, extra_body=extra).choices[0]
        stream = client.chat.completions.create(**asked, stream=True, extra_body=extra)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert whole.message.content == streamed == text
    assert whole.finish_reason == "length"
    tokens = [bytes(entry.bytes) for entry in whole.logprobs.content]
    assert tokens == [tiny_tokenizer.token_bytes(token_id) for token_id in token_ids]
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) for entry in whole.logprobs.content)


def test_a_seed_repeats_every_sample(start: Callable[..., Any]) -> None:
    body = {"model": MODEL, "prompt": "once", "n": 3, "seed": 7, "max_tokens": 12, "ignore_eos": True}
    with start() as (_, url):
        answers = [httpx.post(f"{url}/v1/completions", json=body).json()["choices"] for _ in range(2)]
    texts = [[choice["text"] for choice in choices] for choices in answers]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_metrics_know_the_queue(start: Callable[..., Any]) -> None:
    body = {"model": MODEL, "prompt": "x", "n": 3, "max_tokens": 4, "ignore_eos": True}
    with start(max_num_seqs=1, max_num_batched_tokens=16) as (engine, url):
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        shown = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#")
    name = 'vllm:{}_seconds_{}{{model_name="tiny"}}'
    assert float(shown[name.format("request_queue_time", "count")]) == 3
    queued = float(shown[name.format("request_queue_time", "sum")])
    assert 0 < queued < float(shown[name.format("time_to_first_token", "sum")])
    assert float(shown[name.format("inter_token_latency", "count")]) == 9
    assert float(shown['vllm:generation_tokens_total{model_name="tiny"}']) == engine.stats().generation_tokens == 12


def test_clients_that_leave_free_the_engine(start: Callable[..., Any]) -> None:
    endless = {"model": MODEL, "prompt": "x", "n": 2, "max_tokens": 2000, "ignore_eos": True}

    async def leave(url: str, stream: bool, engine: Engine) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            request = asyncio.create_task(client.post("/v1/completions", json=endless | {"stream": stream}))
            while engine.stats().running < 2:
                await client.get("/health")
            request.cancel()
            while engine.stats().running:
                await client.get("/health")

    with start() as (engine, url):
        for stream in (False, True):
            asyncio.run(leave(url, stream, engine))
        assert engine.stats().waiting == 0
        assert engine.stats().generation_tokens < 2 * 2 * 2000


def test_what_does_not_fit_is_refused_and_nothing_stays(start: Callable[..., Any]) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 2}
    with start(max_num_seqs=1, max_queue_len=1) as (engine, url):
        never = httpx.post(f"{url}/v1/completions", json=body | {"n": 3})
        assert never.status_code == 400  # and not 429: no waiting would help
        assert never.json()["error"]["param"] == "n"
        endless = body | {"n": 2, "max_tokens": 2000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=endless, timeout=60) as busy:
            lines = busy.iter_lines()  # kept: closing it would close the stream
            assert next(lines).startswith("data: ")
            full = httpx.post(f"{url}/v1/completions", json=body)
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        long = httpx.post(f"{url}/v1/completions", json=body | {"prompt": [1] * 2048})
        assert long.status_code == 400
        assert long.json()["error"]["code"] == "context_length_exceeded"
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        while answer.status_code == 429:  # the aborted ones leave with the engine's next step
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        assert engine.stats().running == engine.stats().waiting == 0
