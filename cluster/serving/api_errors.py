"""Errors as OpenAI's clients expect them: an HTTP status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
import math
from typing import Any

from fastapi.responses import Response

from experts.errors import QueueFull, RequestError

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}


class ApiError(Exception):
    """Ends a request with `status`. `param` is the field at fault, `code` a word for programs to compare."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    def body(self) -> bytes:
        """The JSON object, as a response's body or one event of a stream."""
        error = {
            "message": str(self),
            "type": _TYPES.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code,
        }
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def context_length_exceeded(message: str, param: str) -> ApiError:
    return ApiError(message, param=param, code="context_length_exceeded")


def refused_by_engine(error: RequestError) -> ApiError:
    """The engine would not take a sequence: its queue is full (429) or a field is wrong (400)."""
    if isinstance(error, QueueFull):
        retry_after = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
        return ApiError(str(error), status=429, code="queue_full", headers=retry_after)
    return ApiError(str(error), param=error.field)


def failed_in_engine(message: str | None, status: int) -> ApiError:
    """A sequence ended with an error. 503: an expert group is away, which the message names."""
    code = "expert_group_unavailable" if status == 503 else "engine_error"
    return ApiError(message or "the engine ended this request without a reason", status=status, code=code)


def brief(value: Any) -> str:
    """A value of the caller's, short enough for a message."""
    if isinstance(value, (list, dict)):
        return f"an {'array' if isinstance(value, list) else 'object'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
