"""A scripted engine, a small tokenizer and a running server for the tests of the HTTP side."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from cluster.serving.engine import StepTimes
from cluster.serving.health import Health
from cluster.serving.openai_api import create_app
from cluster.serving.request import SamplingParams, TokenEvent, TokenLogprob
from cluster.serving.tokenizer import Tokenizer, load_tokenizer
from experts.errors import QueueFull

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "héllo wörld",
    "你好 世界",
    "🙂🙃👩‍👩‍👧‍👦",
    "def f(x):\n    return x",
]


@dataclass
class Sequence_:
    params: SamplingParams
    on_event: Callable[[TokenEvent], None]
    events: Iterator[TokenEvent]
    num_tokens: int = 0


TIMES = StepTimes(total_s=10.0, attention_s=1.0, router_send_s=2.0, router_wait_s=4.0, sampling_s=0.5)


@dataclass(frozen=True)
class Stats:
    running: int
    waiting: int
    kv_cache_usage: float = 0.25
    times: StepTimes = TIMES


@dataclass
class ScriptedEngine:
    """Says what `answer` yields (token ids or events): one for every live sequence in a step of its thread.

    With `manual`, a step is taken when the test calls `step()`.
    """

    answer: Callable[[Sequence[int], SamplingParams], Iterable[int | TokenEvent]]
    vocab_size: int
    max_model_len: int = 256
    max_sequences: int = 64
    manual: bool = False
    submitted: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    aborted: set[int] = field(default_factory=set)
    live: dict[int, Sequence_] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self._ids = itertools.count()
        self._steps_allowed = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="scripted-engine")
        self._thread.start()

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, on_event: Callable[[TokenEvent], None]) -> int:
        with self.changed:
            if len(self.live) >= self.max_sequences:
                raise QueueFull("the queue is full: try again later", retry_after_s=1.2)
            request_id = next(self._ids)
            self.submitted.append((list(prompt_ids), params))
            self.live[request_id] = Sequence_(params, on_event, self._events(prompt_ids, params))
            self.changed.notify_all()
            return request_id

    def abort(self, request_id: int) -> None:
        with self.changed:
            if self.live.pop(request_id, None) is not None:
                self.aborted.add(request_id)
                self.changed.notify_all()

    def stats(self) -> Stats:
        return Stats(running=len(self.live), waiting=0)

    def step(self) -> None:
        """Let one step happen (manual mode) and wait for it."""
        with self.changed:
            self._steps_allowed += 1
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: self._steps_allowed == 0, timeout=10)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=10)

    def stop(self) -> None:
        with self.changed:
            self._stopping = True
            self.changed.notify_all()
        self._thread.join()

    def _events(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[TokenEvent]:
        for position, item in enumerate(self.answer(prompt_ids, params)):
            event = item if isinstance(item, TokenEvent) else TokenEvent(token_id=item)
            if position == 0:
                event = replace(event, queued_s=0.001)
            if event.token_id is not None and params.logprobs is not None:
                top = tuple(((event.token_id + rank) % self.vocab_size, -0.5 - rank) for rank in range(params.logprobs))
                event = replace(event, logprob=TokenLogprob(token_id=event.token_id, logprob=-0.5, top=top))
            if event.finish_reason is None and position + 1 >= params.max_tokens:
                event = replace(event, finish_reason="length")
            yield event
            if event.finish_reason is not None:
                return
        yield TokenEvent(token_id=0, finish_reason="stop")

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._stopping or self._steps_allowed or (self.live and not self.manual))
                if self._stopping:
                    return
                batch = list(self.live.items())
            for request_id, sequence in batch:
                event = next(sequence.events)
                if event.finish_reason is not None:
                    with self.changed:
                        self.live.pop(request_id, None)
                sequence.on_event(event)
            with self.changed:
                self._steps_allowed = max(0, self._steps_allowed - 1)
                self.changed.notify_all()


class Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@dataclass
class Api:
    """A server and what stands behind it."""

    http: httpx.Client
    engine: ScriptedEngine
    tokenizer: Tokenizer

    @property
    def url(self) -> str:
        return str(self.http.base_url)

    def client(self, **kwargs: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **kwargs)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def say(self, text: str) -> None:
        """Have every sequence answer `text` and end."""
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.engine.answer = lambda prompt_ids, params: token_ids


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with merges that cut through UTF-8 characters."""
    tokenizer = RustTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_dir)


@contextmanager
def running_engine(tokenizer: Tokenizer) -> Iterator[ScriptedEngine]:
    token_ids = tokenizer.encode("the quick brown fox", add_special_tokens=False)
    engine = ScriptedEngine(answer=lambda prompt_ids, params: token_ids, vocab_size=340)
    yield engine
    engine.stop()


@contextmanager
def running_server(app: FastAPI) -> Iterator[str]:
    """Serves on a free port; yields the URL."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, name="server")
    thread.start()
    assert server.listening.wait(10)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def scripted_engine(tokenizer: Tokenizer) -> Iterator[ScriptedEngine]:
    with running_engine(tokenizer) as engine:
        yield engine


@pytest.fixture
def serve() -> Iterator[Callable[[FastAPI], str]]:
    """Serves an application until the test ends."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(running_server(app))


@pytest.fixture
def api(scripted_engine: ScriptedEngine, tokenizer: Tokenizer, serve: Callable[[FastAPI], str]) -> Iterator[Api]:
    app = create_app(scripted_engine, tokenizer, model_name="org/scripted", health=Health)
    with httpx.Client(base_url=serve(app), timeout=30) as http:
        yield Api(http, scripted_engine, tokenizer)


@pytest.fixture(scope="module")
def shared_api(tokenizer: Tokenizer) -> Iterator[Api]:
    """One server for all tests of a module: what they send must leave no trace in it."""
    with running_engine(tokenizer) as engine:
        app = create_app(engine, tokenizer, model_name="org/scripted", health=Health)
        with running_server(app) as url, httpx.Client(base_url=url, timeout=30) as http:
            yield Api(http, engine, tokenizer)
