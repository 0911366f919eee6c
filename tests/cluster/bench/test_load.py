from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.bench.load import RequestTiming, build_prompts, send_load, summarise
from experts.errors import MeshError


def test_figures_are_those_of_the_timings() -> None:
    timings = [
        RequestTiming(sent=10.0, token_times=(10.5, 10.6, 10.7), num_tokens=3),
        RequestTiming(sent=10.1, token_times=(10.8, 10.9, 11.5), num_tokens=3),
    ]
    result = summarise(timings)
    assert result.output_tokens_per_s == pytest.approx(6 / 1.5)
    assert result.ttft_ms_p50 == pytest.approx(600)
    assert result.itl_ms_p50 == pytest.approx(100)
    assert result.itl_ms_p99 == pytest.approx(100 + 500 * 0.97)  # gaps 100, 100, 100, 600, linear in between
    assert result.e2e_ms_p50 == pytest.approx((700 + 1400) / 2)


def test_prompts_differ_and_repeat_with_their_seed() -> None:
    prompts = build_prompts(3, 16, vocab_size=100, seed=1)
    assert prompts == build_prompts(3, 16, vocab_size=100, seed=1)
    assert len({tuple(prompt) for prompt in prompts}) == 3
    assert all(len(prompt) == 16 and min(prompt) >= 4 and max(prompt) < 100 for prompt in prompts)


def test_every_prompt_is_sent_and_no_more_than_streams_at_once(scripted_server: Any) -> None:
    prompts = [[5, 6], [7, 8], [9, 10], [11, 12], [13, 14]]
    timings = asyncio.run(send_load(scripted_server.url, prompts, max_tokens=4, streams=2))
    assert [t.num_tokens for t in timings] == [4] * 5
    assert all(t.sent < t.token_times[0] and len(t.token_times) == 4 for t in timings)
    assert sorted(body["prompt"] for body in scripted_server.bodies) == prompts
    assert scripted_server.most_at_once <= 2
    body = scripted_server.bodies[0]
    assert (body["model"], body["temperature"], body["ignore_eos"], body["stream"]) == ("tiny", 0.0, True, True)


def test_an_error_answer_is_told(scripted_server: Any) -> None:
    scripted_server.status = 404
    with pytest.raises(MeshError, match=r"404.*no such model"):
        asyncio.run(send_load(scripted_server.url, [[5]], max_tokens=4, streams=1))


def test_an_error_within_a_stream_is_told(scripted_server: Any) -> None:
    scripted_server.events = [{"choices": [{"text": "a"}]}, {"error": {"message": "group 1 is gone"}}]
    with pytest.raises(MeshError, match="group 1 is gone"):
        asyncio.run(send_load(scripted_server.url, [[5]], max_tokens=4, streams=1))


def test_a_server_that_stops_early_is_not_measured(scripted_server: Any) -> None:
    scripted_server.events = [{"choices": [{"text": "a"}]}, {"choices": [], "usage": {"completion_tokens": 1}}]
    with pytest.raises(MeshError, match="1 tokens where 4"):
        asyncio.run(send_load(scripted_server.url, [[5]], max_tokens=4, streams=1))


@pytest.mark.parametrize(
    "stream",
    [
        b'data: {"choices": [{"text": "a"}]}\r\n\r\n'
        b'data: {"choices": [{"text": "b"}], "usage": {"completion_tokens": 2}}',
        b': ping\nevent: x\ndata:{"choices": [{"text": "a"}]}\n\ndata: {"choices": [{"text": "b"}]}\n\n'
        b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n',
    ],
)
def test_events_as_servers_write_them(scripted_server: Any, stream: bytes) -> None:
    scripted_server.stream = stream
    (timing,) = asyncio.run(send_load(scripted_server.url + "/", [[5]], max_tokens=2, streams=1))
    assert len(timing.token_times) == timing.num_tokens == 2


@pytest.mark.parametrize("stream", [b"data: {oops\n\n", b"data: {}\n\n", b"data: []\n\n", b"data: \xff\n\n"])
def test_what_is_no_openai_server_is_told(scripted_server: Any, stream: bytes) -> None:
    scripted_server.stream = stream
    with pytest.raises(MeshError, match="no OpenAI server"):
        asyncio.run(send_load(scripted_server.url, [[5]], max_tokens=2, streams=1))


def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.raises(MeshError, match=r"http://127\.0\.0\.1:9: .*Connect"):
        asyncio.run(send_load("http://127.0.0.1:9", [[5]], max_tokens=4, streams=1))
