"""One HTTP request's sequences from submission to their last piece of text."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Literal

from cluster.observe.request_metrics import RequestMetrics
from cluster.serving.api_errors import ApiError, failed_in_engine, refused_by_engine
from cluster.serving.async_engine import AsyncEngine, News, RequestEvents
from cluster.serving.request import SamplingParams
from cluster.serving.text_stream import PlacedLogprob, TextStream
from experts.errors import RequestError


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSpec:
    """A choice to generate: `echo` is text that its answer begins with."""

    prompt_ids: list[int]
    params: SamplingParams
    text: TextStream
    echo: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What is new of one choice: certain text, log-probabilities of its tokens, and whether it ended."""

    index: int
    text: str
    logprobs: list[PlacedLogprob]
    finish_reason: Literal["stop", "length"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of a request: each prompt once, the output of all choices, end tokens included."""

    prompt_tokens: int
    completion_tokens: int


class Generation:
    """Runs the choices of one request. Whoever iterates `deltas` must close it: that frees what runs."""

    def __init__(
        self, engine: AsyncEngine, metrics: RequestMetrics, specs: list[SequenceSpec], *, num_samples: int
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._choices = [_Choice(index, spec, metrics) for index, spec in enumerate(specs)]
        self._num_samples = num_samples

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(len(choice.spec.prompt_ids) for choice in self._choices[:: self._num_samples]),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
        )

    async def deltas(self) -> AsyncGenerator[list[Delta]]:
        """Yields what each wake-up brought, at most one delta a choice; ends when every choice has.

        Raises ApiError where the engine refuses a sequence, or one fails: after the text that came before.
        """
        events = self._engine.open()
        try:
            self._submit(events)
            while any(choice.finish_reason is None for choice in self._choices):
                failure = self._take(await events.next(), events)
                deltas = [delta for choice in self._choices if (delta := choice.delta()) is not None]
                if deltas:
                    yield deltas
                if failure is not None:
                    raise failure
        finally:
            events.close()
            for choice in self._choices:
                choice.give_up()

    def _take(self, batch: list[News], events: RequestEvents) -> ApiError | None:
        for news in batch:
            choice = self._choices[news.index]
            if choice.finish_reason is not None:
                continue  # a stop string ended it, and the engine did not know yet
            try:
                choice.take(news)
            except ApiError as failure:
                return failure
            if choice.finish_reason is not None:
                events.abort(choice.index)
        return None

    def _submit(self, events: RequestEvents) -> None:
        try:
            for choice in self._choices:
                events.submit(choice.index, choice.spec.prompt_ids, choice.spec.params)
        except RequestError as error:
            raise refused_by_engine(error) from error


class _Choice:
    def __init__(self, index: int, spec: SequenceSpec, metrics: RequestMetrics) -> None:
        self.index = index
        self.spec = spec
        self.num_tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self._echo = spec.echo
        self._metrics = metrics
        self._arrived_at = time.monotonic()
        self._last_at: float | None = None
        self._is_counted = False
        self._is_told = False  # that it ended

    def take(self, news: News) -> None:
        """Raises ApiError where the sequence failed."""
        event = news.event
        if event.token_id is not None:
            self._observe_token(news)
            ends_here = event.finish_reason == "stop"  # an end token, which is no part of the text
            if not ends_here and self.spec.text.push(event.token_id, event.logprob):
                self._finish("stop", news.at)
                return
        match event.finish_reason:
            case None:
                pass
            case "stop" | "length" as reason:
                stopped = self.spec.text.finish()
                self._finish("stop" if stopped else reason, news.at)
            case "error":
                self._count("error", news.at)
                raise failed_in_engine(event.error, event.error_status)
            case "abort":
                raise ApiError("the engine was stopped before this request ended", status=503, code="engine_stopped")

    def delta(self) -> Delta | None:
        text, logprobs = self.spec.text.take()
        text, self._echo = self._echo + text, ""
        is_last = self.finish_reason is not None and not self._is_told
        if not text and not logprobs and not is_last:
            return None
        self._is_told = is_last
        return Delta(index=self.index, text=text, logprobs=logprobs, finish_reason=self.finish_reason)

    def give_up(self) -> None:
        """The request is over; a choice that has not ended was aborted."""
        self._count("abort", time.monotonic())

    def _finish(self, reason: Literal["stop", "length"], at: float) -> None:
        self.finish_reason = reason
        self._count(reason, at)

    def _observe_token(self, news: News) -> None:
        self.num_tokens += 1
        if self._last_at is None:
            self._metrics.first_token(
                num_prompt_tokens=len(self.spec.prompt_ids),
                latency_s=news.at - self._arrived_at,
                queued_s=news.event.queued_s,
            )
        else:
            self._metrics.next_token(news.at - self._last_at)
        self._last_at = news.at

    def _count(self, reason: str, at: float) -> None:
        if not self._is_counted:
            self._is_counted = True
            self._metrics.finished(reason, at - self._arrived_at)
