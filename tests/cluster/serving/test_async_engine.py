"""News from the engine's thread: in order, in batches, and none lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from cluster.serving.async_engine import AsyncEngine
from cluster.serving.request import SamplingParams, TokenEvent
from experts.errors import QueueFull

PARAMS = SamplingParams(max_tokens=1000)


class Engine:
    """Only takes down what it is asked."""

    max_model_len = 10
    vocab_size = 10

    def __init__(self) -> None:
        self.on_event: list[Callable[[TokenEvent], None]] = []
        self.aborted: list[int] = []

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, on_event: Callable[[TokenEvent], None]) -> int:
        if len(self.on_event) == 3:
            raise QueueFull("full", 1.0)
        self.on_event.append(on_event)
        return 100 + len(self.on_event) - 1

    def abort(self, request_id: int) -> None:
        self.aborted.append(request_id)


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts how often another thread woke it."""

    num_wakes = 0

    def call_soon_threadsafe(self, *args: object, **kwargs: object) -> asyncio.Handle:
        self.num_wakes += 1
        return super().call_soon_threadsafe(*args, **kwargs)


def test_a_step_of_many_sequences_is_one_wake_up() -> None:
    engine = Engine()

    async def run() -> None:
        bridge = AsyncEngine(engine)
        requests = [bridge.open() for _ in range(3)]
        for request in requests:
            request.submit(0, [1], PARAMS)
        for step in range(5):
            for on_event in engine.on_event:  # on the loop's own thread: it cannot run in between
                on_event(TokenEvent(token_id=step))
            for request in requests:
                assert [news.event.token_id for news in await request.next()] == [step]

    loop = CountingLoop()
    loop.run_until_complete(run())
    loop.close()
    assert loop.num_wakes == 5


def test_nothing_is_lost_or_reordered_between_threads() -> None:
    engine = Engine()
    num_events = 20_000

    async def run() -> list[list[int | None]]:
        bridge = AsyncEngine(engine)
        requests = [bridge.open() for _ in range(3)]
        for request in requests:
            request.submit(0, [1], PARAMS)

        def say() -> None:
            for token_id in range(num_events):
                for on_event in engine.on_event:
                    on_event(TokenEvent(token_id=token_id))

        thread = threading.Thread(target=say)
        thread.start()
        heard: list[list[int | None]] = [[] for _ in requests]
        for request, token_ids in zip(requests, heard, strict=True):
            while len(token_ids) < num_events:
                token_ids += [news.event.token_id for news in await request.next()]
        thread.join()
        return heard

    assert asyncio.run(run()) == [list(range(num_events))] * 3


def test_closing_aborts_what_has_not_ended() -> None:
    engine = Engine()

    async def run() -> None:
        request = AsyncEngine(engine).open()
        for index in range(3):
            request.submit(index, [1], PARAMS)
        with pytest.raises(QueueFull):
            request.submit(3, [1], PARAMS)
        engine.on_event[1](TokenEvent(token_id=5, finish_reason="length"))
        [news] = await request.next()
        assert (news.index, news.event.finish_reason) == (1, "length")
        request.close()
        request.close()

    asyncio.run(run())
    assert engine.aborted == [100, 102]
