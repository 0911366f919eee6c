"""The two request bodies, as pydantic models: OpenAI's fields and vLLM's extensions.

A field that we do not have is accepted where it cannot change the text (`user`, `metadata`), or where it says
what we do anyway (`tools: []`); any other is an error that names it. Nothing is silently ignored.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.serving.api_errors import ApiError, brief
from cluster.serving.foreign_fields import check_foreign_field
from cluster.serving.request import SamplingParams

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP = 4
_SEEDS = 2**63


def _stop_strings(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("should be a string or an array of strings")
    if len(stops) > MAX_STOP:
        raise ValueError(f"should have at most {MAX_STOP} strings, has {len(stops)}")
    if "" in stops:
        raise ValueError("should have no empty string: it would stop before the first token")
    return tuple(stops)


def _message_text(value: Any) -> str:
    """A message's content as one string: a string, or a list of parts of type text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("should be a string or an array of text parts")
    for index, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"part {index} should be of type text (this model reads text only), is {brief(kind)}")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"part {index} should have a string as its text")
    return "\n".join(part["text"] for part in value)


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="accepted; we pad nothing")


class Message(BaseModel):
    """One turn of a conversation, as the chat template sees it."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, AfterValidator(_message_text)]
    name: str | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _reject_extras(self) -> Message:
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in ("refusal", "annotations", "reasoning_content", "reasoning"):
                raise ValueError(f"field {name!r} is not supported in a message: leave it out")
        return self

    def for_template(self) -> dict[str, Any]:
        """Templates know `system`; `developer` is OpenAI's newer name for it."""
        role = "system" if self.role == "developer" else self.role
        extras = {"name": self.name, "tool_call_id": self.tool_call_id, **(self.model_extra or {})}
        return {"role": role, "content": self.content} | {
            name: value for name, value in extras.items() if value is not None
        }


class GenerationRequest(BaseModel):
    """What both endpoints take. None stands for the default, as OpenAI's clients send it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    stop: Annotated[Any, AfterValidator(_stop_strings)] = ()
    top_k: int | None = Field(None, ge=-1, lt=_SEEDS)
    min_p: float | None = Field(None, ge=0, le=1)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ApiError("stream_options goes with stream: true only", param="stream_options")
        limit = self.output_limit
        if self.min_tokens is not None and limit is not None and self.min_tokens > limit:
            raise ApiError(f"min_tokens ({self.min_tokens}) is over max_tokens ({limit})", param="min_tokens")
        for name, value in (self.model_extra or {}).items():
            check_foreign_field(name, value, known=type(self).model_fields)
        return self

    @property
    def output_limit(self) -> int | None:
        """Most tokens to generate, None for as many as the model's context has room for."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Alternatives to report beside each token, None for no log-probabilities."""

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, *, max_tokens: int, sample: int) -> SamplingParams:
        """For the `sample`-th of the n sequences of a prompt: the same request gives each its own seed."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else (self.seed + sample) % _SEEDS,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            min_tokens=self.min_tokens or 0,
            logprobs=self.num_logprobs,
        )


class ChatCompletionRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError("top_logprobs goes with logprobs: true only", param="top_logprobs")
        return self

    @property
    def output_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    prompt: Any
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = None

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError("best_of is not supported: leave it out, or ask for n choices and pick one", param="best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError("logprobs of the prompt are not supported: use either echo or logprobs", param="logprobs")
        return self

    @property
    def output_limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse_request(kind: type[RequestT], body: bytes) -> RequestT:
    """The validated body. Raises ApiError (400) naming the first field at fault."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _first_error(error) from error


def _first_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(f"the request body is no valid JSON: {first['ctx']['error']}", code="json_invalid")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return ApiError(f"{param} is required", param=param, code="missing_required_parameter")
    what = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    what = what.removeprefix("Input ")
    return ApiError(f"{param or 'the request body'} {what}, got {brief(first['input'])}", param=param or None)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
