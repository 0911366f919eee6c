"""Brings the engine's news from its thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.observe.request_metrics import EngineStats
from cluster.serving.request import SamplingParams, TokenEvent


class EngineLike(Protocol):
    """The engine as the API needs it. No method blocks; `on_event` is called from the engine's own thread."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_sequences(self) -> int: ...

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, on_event: Callable[[TokenEvent], None]) -> int:
        """Queue a sequence and return its id. Raises RequestError, QueueFull."""
        ...

    def abort(self, request_id: int) -> None:
        """Free a sequence; nothing happens where it has ended."""
        ...

    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, slots=True)
class News:
    """An event of a request's sequence `index`, and when (time.monotonic) the engine said it."""

    index: int
    event: TokenEvent
    at: float


class AsyncEngine:
    """Hands events to the event loop in batches: one wake-up brings all that the engine said in a step.

    Belongs to the loop of the first request.
    """

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._news: deque[tuple[RequestEvents, News]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake_is_due = False

    def open(self) -> RequestEvents:
        """A place for one request's sequences. Close it, however the request ends. Call on the event loop."""
        self._loop = asyncio.get_running_loop()
        return RequestEvents(self._engine, self._post)

    def _post(self, events: RequestEvents, news: News) -> None:
        """Engine's thread. The flag comes down before the queue is read: a race costs a wake-up at most."""
        self._news.append((events, news))
        if not self._wake_is_due:
            self._wake_is_due = True
            assert self._loop is not None
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._wake_is_due = False
        while self._news:
            events, news = self._news.popleft()
            events.receive(news)


@dataclass(slots=True)
class RequestEvents:
    """The sequences of one HTTP request."""

    engine: EngineLike
    post: Callable[[RequestEvents, News], None]
    _news: list[News] = field(default_factory=list)
    _waiter: asyncio.Future[None] | None = None
    _live: dict[int, int] = field(default_factory=dict)  # index -> engine's request id

    def submit(self, index: int, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Queue sequence `index`. Raises RequestError, QueueFull."""

        def on_event(event: TokenEvent) -> None:
            self.post(self, News(index, event, time.monotonic()))

        self._live[index] = self.engine.submit(prompt_ids, params, on_event)

    def abort(self, index: int) -> None:
        request_id = self._live.pop(index, None)
        if request_id is not None:
            self.engine.abort(request_id)

    def close(self) -> None:
        """Free every sequence that has not ended."""
        for index in list(self._live):
            self.abort(index)

    async def next(self) -> list[News]:
        """Everything that came since the last call; waits for something to come."""
        if not self._news:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        news, self._news = self._news, []
        return news

    def receive(self, news: News) -> None:
        """Event loop, in the order of the engine's events."""
        self._news.append(news)
        if news.event.finish_reason is not None:
            self._live.pop(news.index, None)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
