"""Metrics of requests under vLLM's names, labels and buckets: its dashboards and autoscalers work unchanged.

Source of names and buckets: vllm/v1/metrics/loggers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_INTER_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


STEP_SECONDS = "engine_step_seconds"
"""A counter of our own: what the engine's steps spend their time on."""


class StepTimes(Protocol):
    """See `cluster.serving.engine.StepTimes`."""

    @property
    def total_s(self) -> float: ...
    @property
    def attention_s(self) -> float: ...
    @property
    def router_send_s(self) -> float: ...
    @property
    def router_wait_s(self) -> float: ...
    @property
    def sampling_s(self) -> float: ...


class EngineStats(Protocol):
    """The engine now: sequences in a batch, sequences queued, share of the KV cache in use (0 to 1); its steps."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_cache_usage(self) -> float: ...
    @property
    def times(self) -> StepTimes: ...


class RequestMetrics:
    """Counts sequences: a request for n choices is n of them. Thread-safe."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str, stats: Callable[[], EngineStats]) -> None:
        registry.register(_EngineGauges(model_name, stats))
        self._model_name = model_name
        self._success = Counter(
            "vllm:request_success",
            "Sequences ended, by reason.",
            labelnames=("model_name", "finished_reason"),
            registry=registry,
        )

        def counter(name: str, about: str) -> Counter:
            return Counter(name, about, labelnames=("model_name",), registry=registry).labels(model_name)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, about, labelnames=("model_name",), registry=registry, buckets=buckets)
            return made.labels(model_name)

        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = counter("vllm:generation_tokens", "Tokens generated.")
        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_S
        )
        self._inter_token = histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", _INTER_TOKEN_S
        )
        self._e2e = histogram(
            "vllm:e2e_request_latency_seconds", "From a request's arrival to its last token.", _REQUEST_S
        )
        self._queue = histogram(
            "vllm:request_queue_time_seconds", "From a request's arrival to its first step.", _REQUEST_S
        )

    def first_token(self, *, num_prompt_tokens: int, latency_s: float, queued_s: float | None) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)
        self._generation_tokens.inc()
        self._first_token.observe(latency_s)
        if queued_s is not None:
            self._queue.observe(queued_s)

    def next_token(self, latency_s: float) -> None:
        self._generation_tokens.inc()
        self._inter_token.observe(latency_s)

    def finished(self, reason: str, latency_s: float) -> None:
        """reason: stop, length, abort, error."""
        self._success.labels(self._model_name, reason).inc()
        self._e2e.observe(latency_s)


class _EngineGauges:
    """Reads the engine once a scrape."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, about, value in (
            ("num_requests_running", "Sequences in the engine's batch.", stats.running),
            ("num_requests_waiting", "Sequences in the engine's queue.", stats.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use, 1 is all.", stats.kv_cache_usage),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", about, labels=("model_name",))
            gauge.add_metric((self._model_name,), value)
            yield gauge
        times = stats.times
        parts = {
            "attention": times.attention_s,
            "router_send": times.router_send_s,
            "router_wait": times.router_wait_s,
            "sampling": times.sampling_s,
        }
        seconds = CounterMetricFamily(
            STEP_SECONDS,
            "Seconds of the engine's steps: attention (on a CPU with its projections and norms), gate and sending, "
            "waiting for experts after the shared ones, sampling, and the rest.",
            labels=("model_name", "part"),
        )
        for part, spent_s in (*parts.items(), ("other", max(0.0, times.total_s - sum(parts.values())))):
            seconds.add_metric((self._model_name, part), spent_s)
        yield seconds
