"""The API through the openai package's own clients and types."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.shared import ErrorObject
from prometheus_client.parser import text_string_to_metric_families

from cluster.bench.step_times import shares_of, step_seconds
from cluster.serving.health import GroupHealth, Health
from cluster.serving.openai_api import create_app
from cluster.serving.request import TokenEvent

MODEL = "org/scripted"
USER = [{"role": "user", "content": "hi"}]


def chat(api, **body: object) -> httpx.Response:
    return api.http.post("/v1/chat/completions", json={"model": MODEL, "messages": USER} | body)


def complete(api, **body: object) -> httpx.Response:
    return api.http.post("/v1/completions", json={"model": MODEL, "prompt": "hi"} | body)


def events(response: httpx.Response) -> list[dict]:
    """The JSON of every server-sent event; the last one is checked to be [DONE] and left out."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def error_of(response: httpx.Response) -> ErrorObject:
    return ErrorObject.model_validate(response.json()["error"], strict=True)


def streamed_text(chunks: Iterable[dict], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def test_chat(api) -> None:
    answer = api.client().chat.completions.create(model=MODEL, messages=USER)
    ChatCompletion.model_validate(answer.model_dump(), strict=True)
    assert answer.choices[0].message.content == "the quick brown fox"
    assert answer.choices[0].finish_reason == "stop"
    [(prompt_ids, params)] = api.engine.submitted
    assert api.tokenizer.decode(prompt_ids) == "<|user|>hi<|end|><|assistant|>"
    assert params.max_tokens == api.engine.max_model_len - len(prompt_ids)
    assert answer.usage.prompt_tokens == len(prompt_ids)
    assert answer.usage.completion_tokens == 5  # the end token too
    assert answer.usage.total_tokens == len(prompt_ids) + 5


def test_chat_raw_json_is_strictly_of_the_type(api) -> None:
    response = chat(api, logprobs=True, top_logprobs=3, n=2)
    ChatCompletion.model_validate_json(response.content, strict=True)


def test_chat_stream(api) -> None:
    chunks = events(chat(api, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert streamed_text(chunks) == "the quick brown fox"


def test_chat_stream_without_usage_has_none(api) -> None:
    assert all("usage" not in chunk for chunk in events(chat(api, stream=True)))


def test_chat_stream_through_the_client(api) -> None:
    stream = api.client().chat.completions.create(model=MODEL, messages=USER, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "the quick brown fox"


def test_many_async_streams_at_once(api) -> None:
    texts = [f"answer {index} of many, wörld 🙂 {'x' * index}" for index in range(16)]
    ids = [api.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    api.engine.answer = lambda prompt_ids, params: ids[params.seed]

    async def read(client: openai.AsyncOpenAI, index: int) -> str:
        stream = await client.chat.completions.create(model=MODEL, messages=USER, seed=index, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def read_all() -> list[str]:
        async with api.async_client() as client:
            return await asyncio.gather(*(read(client, index) for index in range(16)))

    assert asyncio.run(read_all()) == texts


def test_choices_are_streamed_side_by_side(api) -> None:
    chunks = events(complete(api, stream=True, n=3))
    assert [streamed_text(chunks, index) for index in range(3)] == ["the quick brown fox"] * 3


def test_completion_of_text(api) -> None:
    answer = api.client().completions.create(model=MODEL, prompt="hi", max_tokens=2, logprobs=2)
    Completion.model_validate(answer.model_dump(), strict=True)
    [choice] = answer.choices
    assert (choice.text, choice.finish_reason) == ("the quick", "length")
    assert choice.logprobs.tokens == ["the", " quick"]
    assert choice.logprobs.text_offset == [0, 3]
    assert choice.logprobs.token_logprobs == [-0.5, -0.5]
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2, 2]
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("hi", ["hi"]), (["hi", "yo"], ["hi", "yo"]), ([300, 301], None), ([[300], [301, 302]], None)],
)
def test_completion_prompts(api, prompt: object, texts: list[str] | None) -> None:
    answer = api.client().completions.create(model=MODEL, prompt=prompt, n=2)
    submitted = [prompt_ids for prompt_ids, _ in api.engine.submitted]
    if texts is not None:
        expected = [api.tokenizer.encode(text, add_special_tokens=True) for text in texts]
    else:
        expected = prompt if isinstance(prompt[0], list) else [prompt]
    assert submitted == [prompt_ids for prompt_ids in expected for _ in range(2)]
    assert [choice.index for choice in answer.choices] == list(range(len(submitted)))
    assert answer.usage.prompt_tokens == sum(map(len, expected))


@pytest.mark.parametrize("stream", [False, True])
def test_echo(api, stream: bool) -> None:
    response = complete(api, prompt="wörld: ", echo=True, stream=stream)
    text = streamed_text(events(response)) if stream else response.json()["choices"][0]["text"]
    assert text == "wörld: the quick brown fox"


def test_default_length_of_completions_is_openais(api) -> None:
    api.engine.answer = lambda prompt_ids, params: [300] * 100
    assert complete(api).json()["usage"]["completion_tokens"] == 16


def test_max_completion_tokens_wins(api) -> None:
    answer = chat(api, max_tokens=4, max_completion_tokens=2).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (2, "length")


def test_output_ends_with_the_context(api) -> None:
    complete(api, max_tokens=100_000, prompt=[300] * 250)
    assert api.engine.submitted[0][1].max_tokens == 6


def test_sampling_parameters_reach_the_engine(api) -> None:
    sampling = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 1.5,
        "frequency_penalty": -1.5,
        "ignore_eos": True,
        "min_tokens": 3,
    }
    assert complete(api, **sampling, stop_token_ids=[5, 9], seed=41, n=2, logprobs=4).status_code == 200
    first, second = (params for _, params in api.engine.submitted)
    assert {name: getattr(first, name) for name in sampling} == sampling
    assert first.stop_token_ids == {5, 9}
    assert (first.seed, second.seed) == (41, 42)
    assert first.logprobs == 4


def test_defaults_reach_the_engine(api) -> None:
    nothing = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "seed", "stop", "n", "logprobs", "stream"))
    assert complete(api, **nothing).status_code == 200
    params = api.engine.submitted[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.seed, params.logprobs, params.stop_token_ids) == (None, None, frozenset())


def test_top_k_of_minus_one_is_off(api) -> None:
    assert complete(api, top_k=-1).status_code == 200
    assert api.engine.submitted[0][1].top_k == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"stop": "wn f"}, "the quick bro"),
        ({"stop": ["nothing", "brown", "ck br"]}, "the qui"),
        ({"stop": "wn f", "include_stop_str_in_output": True}, "the quick brown f"),
        ({"stop": ["foxes"]}, "the quick brown fox"),
    ],
)
def test_stop_strings(api, stream: bool, extra: dict, text: str) -> None:
    response = chat(api, **extra, stream=stream)
    if stream:
        chunks = events(response)
        assert streamed_text(chunks) == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")


def test_a_stop_string_frees_the_sequence(api) -> None:
    api.engine.answer = lambda prompt_ids, params: iter(lambda: 300, None)  # without end
    token = api.tokenizer.decode([300])
    assert complete(api, stop=token * 3, max_tokens=None).json()["choices"][0]["text"] == ""
    api.engine.wait_for(lambda: not api.engine.live)


def test_characters_over_several_tokens_stay_whole(api) -> None:
    text = "a🙂b👩‍👩‍👧‍👦你好 é"
    by_byte = {api.tokenizer.token_bytes(token_id): token_id for token_id in range(340)}
    api.engine.answer = lambda prompt_ids, params: [by_byte[bytes([byte])] for byte in text.encode()]
    chunks = events(complete(api, stream=True, max_tokens=200))
    assert "\ufffd" not in "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert streamed_text(chunks) == text


def test_special_tokens(api) -> None:
    api.engine.answer = lambda prompt_ids, params: [300, 0, 300]
    token = api.tokenizer.decode([300])
    assert complete(api).json()["choices"][0]["text"] == token * 2
    assert complete(api, skip_special_tokens=False).json()["choices"][0]["text"] == f"{token}<|end|>{token}"


def test_chat_logprobs(api) -> None:
    api.say("é🙂")
    whole = chat(api, logprobs=True, top_logprobs=2).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "é🙂"
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    chunks = events(chat(api, logprobs=True, top_logprobs=2, stream=True))
    streamed = [
        entry
        for chunk in chunks
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content


def test_logprobs_without_alternatives(api) -> None:
    entries = chat(api, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in entries] == [[]] * 4


def test_stream_and_whole_say_the_same(api) -> None:
    api.say("def f(x):\n    return x 🙂")
    whole = complete(api, logprobs=2, stop=["zzz"], max_tokens=50).json()["choices"][0]
    chunks = events(complete(api, logprobs=2, stop=["zzz"], max_tokens=50, stream=True))
    assert streamed_text(chunks) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [item for chunk in chunks for item in chunk["choices"][0]["logprobs"][name]] == values


def test_models(api) -> None:
    client = api.client()
    [model] = client.models.list().data
    Model.model_validate(model.model_dump(), strict=True)
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-9")
    assert caught.value.code == "model_not_found"


def test_messages_reach_the_template(api) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "3", "refusal": None, "tool_calls": None},
    ]
    assert chat(api, messages=messages, add_generation_prompt=False).status_code == 200
    text = api.tokenizer.decode(api.engine.submitted[0][0])
    assert text == "<|system|>be brief<|end|><|user|>one\ntwo<|end|><|assistant|>3<|end|>"


def test_the_last_message_can_be_continued(api) -> None:
    messages = [*USER, {"role": "assistant", "content": "well"}]
    assert chat(api, messages=messages, continue_final_message=True).status_code == 200
    assert api.tokenizer.decode(api.engine.submitted[0][0]) == "<|user|>hi<|end|><|assistant|>well"


def test_harmless_fields_are_accepted(api) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"}
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "logit_bias": {}}
    assert chat(api, **harmless, **neutral).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_client_that_leaves_frees_its_sequences(api, stream: bool, path: str) -> None:
    api.engine.manual = True
    body = {"model": MODEL, "stream": stream, "n": 3, "max_tokens": 100}
    body |= {"prompt": "hi"} if path == "completions" else {"messages": USER}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=f"{api.url}/v1/") as client:
            request = asyncio.create_task(client.post(path, json=body))
            await asyncio.to_thread(api.engine.wait_for, lambda: len(api.engine.live) == 3)
            if stream:
                await asyncio.to_thread(api.engine.step)
            request.cancel()

    asyncio.run(leave())
    api.engine.wait_for(lambda: not api.engine.live)
    assert api.engine.aborted == {0, 1, 2}
    api.engine.manual = False
    assert chat(api).status_code == 200


def test_a_stream_shows_each_step_when_it_happens(api) -> None:
    api.engine.manual = True
    stepped = threading.Thread(target=lambda: api.engine.wait_for(lambda: api.engine.live) or api.engine.step())
    stepped.start()
    words = []
    with api.client().chat.completions.create(model=MODEL, messages=USER, stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                words.append(chunk.choices[0].delta.content)
                if len(words) == 3:
                    break
                api.engine.step()
    stepped.join()
    assert words == ["the", " quick", " brown"]
    api.engine.wait_for(lambda: not api.engine.live)


def test_full_queue(api) -> None:
    api.engine.max_sequences = 2
    for stream in (False, True):
        response = chat(api, n=3, stream=stream)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "2"
        assert error_of(response).code == "queue_full"
        api.engine.wait_for(lambda: not api.engine.live)
    with pytest.raises(openai.RateLimitError):
        api.client().chat.completions.create(model=MODEL, messages=USER, n=3)
    assert chat(api, n=2).status_code == 200


def failing(after: int) -> Callable[..., list[int | TokenEvent]]:
    failure = TokenEvent(
        token_id=None, finish_reason="error", error="expert group 2 did not come back", error_status=503
    )
    return lambda prompt_ids, params: [300] * after + [failure]


@pytest.mark.parametrize("stream", [False, True])
def test_group_unavailable_before_the_first_token(api, stream: bool) -> None:
    api.engine.answer = failing(after=0)
    response = chat(api, stream=stream)
    assert response.status_code == 503
    assert "group 2" in error_of(response).message
    assert error_of(response).code == "expert_group_unavailable"


def test_group_unavailable_in_a_stream(api) -> None:
    api.engine.answer = failing(after=3)
    response = chat(api, stream=True, n=2)
    lines = response.text.split("\n\n")
    last = json.loads(lines[-2].removeprefix("data: "))
    assert "group 2" in ErrorObject.model_validate(last["error"], strict=True).message
    assert "[DONE]" not in response.text
    api.engine.wait_for(lambda: not api.engine.live)
    with pytest.raises(openai.APIError, match="group 2"):
        list(api.client().chat.completions.create(model=MODEL, messages=USER, stream=True))


def test_group_unavailable_later_in_a_whole_answer(api) -> None:
    api.engine.answer = failing(after=3)
    with pytest.raises(openai.InternalServerError) as caught:
        api.client().chat.completions.create(model=MODEL, messages=USER)
    assert caught.value.status_code == 503


def test_a_stopped_engine(api) -> None:
    api.engine.answer = lambda prompt_ids, params: [300, TokenEvent(token_id=None, finish_reason="abort")]
    assert error_of(chat(api)).code == "engine_stopped"


def test_health(scripted_engine, tokenizer, serve) -> None:
    states = [
        Health(groups=(GroupHealth(group=0, alive=True),)),
        Health(groups=(GroupHealth(group=0, alive=True), GroupHealth(group=1, alive=False, reason="killed"))),
        Health(problems=("the rebalancer died",)),
    ]
    app = create_app(scripted_engine, tokenizer, model_name=MODEL, health=lambda: states[0])
    url = serve(app)
    assert httpx.get(f"{url}/health").status_code == 200
    states.pop(0)
    response = httpx.get(f"{url}/health")
    assert response.status_code == 503
    assert response.json()["groups"][1] == {"group": 1, "alive": False, "reason": "killed"}
    states.pop(0)
    assert httpx.get(f"{url}/health").json() == {
        "status": "unavailable",
        "groups": [],
        "problems": ["the rebalancer died"],
    }


def test_metrics(api) -> None:
    chat(api, n=2)
    complete(api, max_tokens=2)
    families = text_string_to_metric_families(api.http.get("/metrics").text)
    samples = {(sample.name, sample.labels.get("finished_reason")): sample for f in families for sample in f.samples}
    assert samples["vllm:request_success_total", "stop"].value == 2
    assert samples["vllm:request_success_total", "length"].value == 1
    assert samples["vllm:generation_tokens_total", None].value == 12
    assert samples["vllm:time_to_first_token_seconds_count", None].value == 3
    assert samples["vllm:inter_token_latency_seconds_count", None].value == 9
    assert samples["vllm:e2e_request_latency_seconds_count", None].value == 3
    assert samples["vllm:request_queue_time_seconds_sum", None].value == pytest.approx(0.003)
    assert samples["vllm:kv_cache_usage_perc", None].value == 0.25
    assert all(sample.labels["model_name"] == MODEL for sample in samples.values())


def test_metrics_say_what_the_steps_spent_their_time_on(api) -> None:
    spent = step_seconds(str(api.http.base_url))
    assert spent == {"attention": 1.0, "router_send": 2.0, "router_wait": 4.0, "sampling": 0.5, "other": 2.5}
    before = dict.fromkeys(spent, 0.5)
    shares = shares_of(before, spent, 20.0)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert (shares["router_wait"], shares["between_steps"]) == (pytest.approx(0.175), pytest.approx(0.625))
    assert shares_of({}, step_seconds("http://127.0.0.1:1"), 20.0) == {}


def test_api_keys(scripted_engine, tokenizer, serve) -> None:
    keys = frozenset({"alpha", "schlüssel"})
    url = serve(create_app(scripted_engine, tokenizer, model_name=MODEL, health=Health, api_keys=keys))

    def status(*headers: tuple[bytes, bytes]) -> httpx.Response:
        return httpx.get(f"{url}/v1/models", headers=headers)

    assert status((b"authorization", b"Bearer alpha")).status_code == 200
    assert status((b"authorization", b"bearer alpha")).status_code == 200
    assert status((b"authorization", "Bearer schlüssel".encode())).status_code == 200
    for wrong in (b"Bearer beta", b"Bearer alph", b"Basic alpha", b"alpha", b"Bearer", b"Bearer \xff\xfe"):
        response = status((b"authorization", wrong))
        assert response.status_code == 401
        assert error_of(response).code == "invalid_api_key"
    assert status().status_code == 401
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0).models.list()
    assert httpx.get(f"{url}/health").status_code == 200
    assert httpx.post(f"{url}/v1/chat/completions", content=b"x").status_code == 401
