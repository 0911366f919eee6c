"""How an answer leaves: as one JSON object when all is done, or as server-sent events while it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cluster.serving.api_errors import ApiError
from cluster.serving.generation import Delta, Generation, Usage

ResultT = TypeVar("ResultT")


class ResponseShape(Protocol):
    """An endpoint's JSON. `chunks` and `usage_chunk` give whole server-sent events."""

    def chunks(self, delta: Delta) -> str: ...
    def usage_chunk(self, usage: Usage) -> str: ...
    def whole(self, choices: list[Delta], usage: Usage) -> dict[str, Any]: ...


def usage_object(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class GenerationResponse(Response):
    """Runs a generation for as long as its client is there: one that leaves frees its sequences at once."""

    def __init__(self, generation: Generation, shape: ResponseShape, *, stream: bool, include_usage: bool) -> None:
        self._generation = generation
        self._shape = shape
        self._stream = stream
        self._include_usage = include_usage
        self.background = None  # Starlette looks at it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._send_events if self._stream else self._send_whole
        await _while_connected(receive, answer(scope, receive, send))

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: Response
        try:
            answer = JSONResponse(self._shape.whole(await self._join(), self._generation.usage))
        except ApiError as error:
            answer = error.response()
        await answer(scope, receive, send)

    async def _join(self) -> list[Delta]:
        parts: dict[int, list[Delta]] = {}
        async with aclosing(self._generation.deltas()) as deltas:
            async for batch in deltas:
                for delta in batch:
                    parts.setdefault(delta.index, []).append(delta)
        return [
            Delta(
                index=index,
                text="".join(delta.text for delta in parts[index]),
                logprobs=[logprob for delta in parts[index] for logprob in delta.logprobs],
                finish_reason=parts[index][-1].finish_reason,
            )
            for index in sorted(parts)
        ]

    async def _send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The status waits for the first token, so that what fails before it is an HTTP error."""
        async with aclosing(self._events()) as events:
            try:
                first = await anext(events)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": first.encode(), "more_body": True})
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
                last = b"data: [DONE]\n\n"
            except ApiError as error:
                last = b"data: " + error.body() + b"\n\n"
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _events(self) -> AsyncGenerator[str]:
        async with aclosing(self._generation.deltas()) as deltas:
            async for batch in deltas:
                yield "".join(map(self._shape.chunks, batch))
        if self._include_usage:
            yield self._shape.usage_chunk(self._generation.usage)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, and drop it when the client goes away."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
        await asyncio.wait((working, leaving))
    if not working.cancelled():
        working.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
