"""The OpenAI-compatible HTTP application. Any ASGI server hosts it, Ray Serve included."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException

from cluster.observe.request_metrics import RequestMetrics
from cluster.serving.api_errors import ApiError, refused_by_engine
from cluster.serving.async_engine import AsyncEngine, EngineLike
from cluster.serving.chat_response import ChatResponse
from cluster.serving.completion_response import CompletionResponse
from cluster.serving.generation import Generation, SequenceSpec
from cluster.serving.health import Health
from cluster.serving.prompts import PromptEncoder
from cluster.serving.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    parse_request,
)
from cluster.serving.response import GenerationResponse, ResponseShape
from cluster.serving.text_stream import TextStream
from cluster.serving.tokenizer import Tokenizer
from experts.errors import RequestError

MAX_BODY_BYTES = 8 * 2**20


def create_app(
    engine: EngineLike,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    health: Callable[[], Health],
    api_keys: frozenset[str] | None = None,
    registry: CollectorRegistry | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:
    """The application in front of one engine.

    health:   asked on every /health; must answer from memory
    api_keys: where given, /v1 wants one of them as bearer token; /health and /metrics stay open
    registry: metrics that /metrics shows beside those of requests
    """
    registry = CollectorRegistry() if registry is None else registry
    api = OpenAiApi(
        engine,
        tokenizer,
        model_name=model_name,
        metrics=RequestMetrics(registry, model_name=model_name, stats=engine.stats),
        max_body_bytes=max_body_bytes,
    )
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(_bearer_of(api_keys))] if api_keys is not None else [])
    v1.add_api_route("/chat/completions", api.chat_completions, methods=["POST"], response_model=None)
    v1.add_api_route("/completions", api.completions, methods=["POST"], response_model=None)
    v1.add_api_route("/models", api.models, methods=["GET"], response_model=None)
    v1.add_api_route("/models/{model:path}", api.model, methods=["GET"], response_model=None)

    app = FastAPI(title="ExpertMesh")
    app.include_router(v1)

    @app.get("/health", response_model=None)
    async def health_page() -> Response:
        now = health()
        return JSONResponse(now.as_json(), 200 if now.ok else 503)

    @app.get("/metrics", response_model=None)
    async def metrics_page() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestError, _request_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _our_fault)
    return app


class OpenAiApi:
    """The endpoints under /v1."""

    def __init__(
        self,
        engine: EngineLike,
        tokenizer: Tokenizer,
        *,
        model_name: str,
        metrics: RequestMetrics,
        max_body_bytes: int,
    ) -> None:
        self._engine = AsyncEngine(engine)
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._prompts = PromptEncoder(
            tokenizer,
            max_model_len=engine.max_model_len,
            vocab_size=engine.vocab_size,
            max_sequences=engine.max_sequences,
        )
        self._card = {
            "id": model_name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "expertmesh",
            "max_model_len": engine.max_model_len,
        }

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def model(self, model: str) -> Response:
        self._check_model(model)
        return JSONResponse(self._card)

    async def chat_completions(self, http: Request) -> Response:
        request = parse_request(ChatCompletionRequest, await self._read(http))
        self._check_model(request.model)
        prompt_ids = await self._prompts.encode_chat(request)
        shape = ChatResponse(
            model=request.model,
            tokenizer=self._tokenizer,
            with_logprobs=request.num_logprobs is not None,
            include_usage=request.include_usage,
        )
        return self._answer(request, [prompt_ids], shape)

    async def completions(self, http: Request) -> Response:
        request = parse_request(CompletionRequest, await self._read(http))
        self._check_model(request.model)
        prompts = await self._prompts.encode_completion(request)
        shape = CompletionResponse(
            model=request.model,
            tokenizer=self._tokenizer,
            with_logprobs=request.num_logprobs is not None,
            include_usage=request.include_usage,
        )
        return self._answer(request, prompts, shape, echo=bool(request.echo))

    def _answer(
        self,
        request: GenerationRequest,
        prompts: list[list[int]],
        shape: ResponseShape,
        *,
        echo: bool = False,
    ) -> Response:
        self._prompts.check_stop_tokens(request.stop_token_ids)
        num_samples = request.n or 1
        specs = [
            self._sequence(request, prompt_ids, sample, echo=echo)
            for prompt_ids in prompts
            for sample in range(num_samples)
        ]
        generation = Generation(self._engine, self._metrics, specs, num_samples=num_samples)
        return GenerationResponse(generation, shape, stream=bool(request.stream), include_usage=request.include_usage)

    def _sequence(self, request: GenerationRequest, prompt_ids: list[int], sample: int, *, echo: bool) -> SequenceSpec:
        skip_special_tokens = request.skip_special_tokens is not False
        room = self._prompts.room_for_output(prompt_ids)
        max_tokens = room if request.output_limit is None else min(request.output_limit, room)
        return SequenceSpec(
            prompt_ids=prompt_ids,
            params=request.sampling_params(max_tokens=max_tokens, sample=sample),
            text=TextStream(
                self._tokenizer.detokenizer(skip_special_tokens=skip_special_tokens),
                stop=request.stop,
                include_stop=bool(request.include_stop_str_in_output),
                min_tokens=request.min_tokens or 0,
            ),
            echo=self._tokenizer.decode(prompt_ids, skip_special_tokens=skip_special_tokens) if echo else "",
        )

    def _check_model(self, model: str) -> None:
        if model != self._card["id"]:
            raise ApiError(
                f"there is no model {model[:100]!r} here; this server serves {self._card['id']!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def _read(self, http: Request) -> bytes:
        """The body. One over the limit is read on but not kept, so that the client gets to see our answer."""
        parts: list[bytes] = []
        size = 0
        async for part in http.stream():
            size += len(part)
            if size <= self._max_body_bytes:
                parts.append(part)
            elif size > 16 * self._max_body_bytes:
                break
            else:
                parts.clear()
        if size > self._max_body_bytes:
            raise ApiError(
                f"the request body is over {self._max_body_bytes} bytes: send a shorter prompt",
                status=413,
                code="request_too_large",
            )
        return b"".join(parts)


def _bearer_of(api_keys: frozenset[str]) -> Callable[[Request], None]:
    keys = [key.encode() for key in api_keys]

    def check(http: Request) -> None:
        scheme, _, token = http.headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1")
        # Every key is compared, in constant time each: the time taken tells nothing of how near a guess was.
        matches = [hmac.compare_digest(given, key) for key in keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(
                "a valid API key is needed: send it as 'Authorization: Bearer KEY'",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    return check


async def _api_error(_: Request, error: Any) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _request_error(_: Request, error: Any) -> Response:
    assert isinstance(error, RequestError)
    return refused_by_engine(error).response()


async def _http_error(http: Request, error: Any) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path}: {error.detail}"
    return ApiError(message, status=error.status_code, headers=dict(error.headers or {})).response()


async def _our_fault(_: Request, __: Any) -> Response:
    return ApiError("an error of the server; its log has the details", status=500, code="internal_error").response()
