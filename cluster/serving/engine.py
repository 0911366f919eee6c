"""The engine: one thread that turns queued prompts into tokens, step by step."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cluster.serving.kv_cache import KVCache
from cluster.serving.micro_batch import Step
from cluster.serving.model_runner import ModelRunner, OverlapThresholds
from cluster.serving.request import SamplingParams, TokenEvent
from cluster.serving.rope_reach import check_reach
from cluster.serving.sampler import sample
from cluster.serving.scheduler import Scheduler
from cluster.serving.sequence import RunningSequence
from cluster.serving.skeleton import ModelSkeleton
from experts.errors import ConfigError, GroupUnavailable, QueueFull, RequestError

_LOG = logging.getLogger(__name__)
_FINISH_RATE_WINDOW = 32
_STOP_TIMEOUT_S = 10.0
# An operator on so many is shared among OpenMP's threads.
_SHARED_VALUES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Seconds since the start, by what they went to; on a GPU, launches rather than kernels.

    total_s holds the other four and what remains: the modules around attention and experts.
    router_wait_s: waiting for experts, after the shared expert was done and while no other micro-batch computed
    overlapped_steps: those of `steps` that were computed as two micro-batches
    """

    steps: int = 0
    overlapped_steps: int = 0
    total_s: float = 0.0
    attention_s: float = 0.0
    router_send_s: float = 0.0
    router_wait_s: float = 0.0
    sampling_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The engine now, and its counters since the start. kv_cache_usage: 0 to 1."""

    running: int
    waiting: int
    kv_cache_usage: float
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    times: StepTimes


class Engine:
    """Continuous batching over a skeleton. `submit`, `abort` and `stats` may be called from any thread.

    max_num_seqs:           most sequences in a batch
    max_num_batched_tokens: most tokens in a step, prompt chunks included
    max_model_len:          most tokens of a sequence, prompt included
    kv_cache_memory:        bytes
    max_queue_len:          most sequences waiting beyond those in the batch
    overlap:                which steps are computed as two micro-batches; None: none
    """

    def __init__(
        self,
        skeleton: ModelSkeleton,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        kv_cache_memory: int,
        max_queue_len: int,
        overlap: OverlapThresholds | None = None,
    ) -> None:
        """Raises ConfigError where the limits contradict each other or the model."""
        check_reach(max_model_len, skeleton.max_position_embeddings)
        if max_num_batched_tokens < max_num_seqs:
            raise ConfigError(
                f"engine.max_num_batched_tokens ({max_num_batched_tokens}) is less than engine.max_num_seqs "
                f"({max_num_seqs}): a step must have room for a token of every sequence"
            )
        self._skeleton = skeleton
        self._runner = ModelRunner(skeleton, overlap)
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self._capacity = max_num_seqs + max_queue_len
        with torch.inference_mode():
            self._cache = KVCache(
                skeleton.kv_layout,
                memory=kv_cache_memory,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
            )
        self._scheduler = Scheduler(
            self._cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self._ids = itertools.count()
        self._changed = threading.Condition()
        self._submitted: deque[RunningSequence] = deque()
        self._aborted: set[int] = set()
        self._unfinished: dict[int, RunningSequence] = {}
        self._stopping = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._finished_at: deque[float] = deque(maxlen=_FINISH_RATE_WINDOW)
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._steps = self._overlapped_steps = 0
        self._total_s = self._attention_s = self._sampling_s = 0.0

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def vocab_size(self) -> int:
        return self._skeleton.vocab_size

    @property
    def max_sequences(self) -> int:
        """Most that run and wait together."""
        return self._capacity

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._skeleton.eos_token_ids

    def start(self) -> None:
        """Return when its thread has those of OpenMP, which stay on the cores that it is on now."""
        self._thread.start()
        self._started.wait()

    def stop(self) -> None:
        """End after the current step; whatever is unfinished gets an `abort` event.

        A step that waits for a lost group is not waited for: its thread ends with the process.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join(_STOP_TIMEOUT_S)
            if self._thread.is_alive():
                _LOG.warning("the current step has not ended after %g s; leaving it", _STOP_TIMEOUT_S)

    def submit(self, prompt_ids: Sequence[int], params: SamplingParams, on_event: Callable[[TokenEvent], None]) -> int:
        """Queue a sequence; its id. `on_event` is called from the engine's thread and must not block.

        Raises RequestError naming the field, QueueFull saying when to try again.
        """
        self._check_prompt(prompt_ids)
        with self._changed:
            if self._stopping:
                raise QueueFull("the engine is shutting down; ask another replica", retry_after_s=1.0)
            if len(self._unfinished) >= self._capacity:
                raise QueueFull(
                    f"{len(self._unfinished)} sequences are running or waiting, the limit is {self._capacity} "
                    "(engine.max_num_seqs + engine.max_queue_len); try again later",
                    retry_after_s=self._retry_after_s(),
                )
            sequence = RunningSequence(
                next(self._ids),
                prompt_ids,
                params,
                on_event,
                max_model_len=self._max_model_len,
                eos_token_ids=self.eos_token_ids,
            )
            self._unfinished[sequence.id] = sequence
            self._submitted.append(sequence)
            self._changed.notify()
        return sequence.id

    def abort(self, request_id: int) -> None:
        """End a sequence before the next step, with an `abort` event; nothing happens where it has ended."""
        with self._changed:
            if request_id in self._unfinished:
                self._aborted.add(request_id)
                self._changed.notify()

    def stats(self) -> EngineStats:
        running = len(self._scheduler.running)
        connection = self._skeleton.connection
        return EngineStats(
            running=running,
            waiting=max(0, len(self._unfinished) - running),
            kv_cache_usage=self._cache.usage,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            preemptions=self._scheduler.num_preemptions,
            times=StepTimes(
                steps=self._steps,
                overlapped_steps=self._overlapped_steps,
                total_s=self._total_s,
                attention_s=self._attention_s,
                router_send_s=connection.send_s,
                router_wait_s=connection.wait_s,
                sampling_s=self._sampling_s,
            ),
        )

    def _check_prompt(self, prompt_ids: Sequence[int]) -> None:
        if not prompt_ids:
            raise RequestError("prompt is empty; at least one token is needed", "prompt")
        if len(prompt_ids) >= self._max_model_len:
            raise RequestError(
                f"prompt has {len(prompt_ids)} tokens; the model's limit is {self._max_model_len} tokens including "
                f"at least one generated: shorten it to {self._max_model_len - 1}",
                "prompt",
            )
        low, high = min(prompt_ids), max(prompt_ids)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise RequestError(
                f"prompt holds token id {wrong}; this model's ids are 0 to {self.vocab_size - 1}", "prompt"
            )

    def _retry_after_s(self) -> float:
        """Until a sequence is likely to end, from the pace at which the last ones did."""
        if len(self._finished_at) < 2:
            return 1.0
        pace_s = (self._finished_at[-1] - self._finished_at[0]) / (len(self._finished_at) - 1)
        return min(max(pace_s, 0.1), 60.0)

    @torch.inference_mode()
    def _run(self) -> None:
        torch.ones(_SHARED_VALUES).exp_()
        self._started.set()
        while self._take_news():
            step: Step = []
            try:
                step = self._scheduler.schedule()
                if step:
                    self._step(step)
                elif self._scheduler.waiting and not self._scheduler.running:  # so nobody will make room
                    raise MemoryError("no memory for its keys and values; lower engine.kv_cache_memory")
            except Exception as error:  # whatever a step dies of, the engine and everyone else live on
                in_step = [sequence for sequence, _ in step]
                self._fail(in_step or list(self._scheduler.running) or [self._scheduler.waiting[0]], error)
        for sequence in list(self._unfinished.values()):
            self._finish(sequence, TokenEvent(token_id=None, finish_reason="abort"))

    def _take_news(self) -> bool:
        """Wait for work, take over what was submitted and aborted; False when it is time to stop."""
        with self._changed:
            while not (self._submitted or self._aborted or self._scheduler.running or self._scheduler.waiting):
                if self._stopping:
                    return False
                self._changed.wait()
            submitted, self._submitted = self._submitted, deque()
            aborted, self._aborted = self._aborted, set()
            stopping = self._stopping
        for sequence in submitted:
            self._scheduler.add(sequence)
            self._prompt_tokens += sequence.num_prompt
        for request_id in aborted:
            if request_id in self._unfinished:
                self._end(self._unfinished[request_id], TokenEvent(token_id=None, finish_reason="abort"))
        return not stopping

    def _step(self, step: Step) -> None:
        started = time.perf_counter()
        for sequence, _ in step:
            if sequence.queued_s is None:
                sequence.queued_s = time.monotonic() - sequence.submitted
        output = self._runner.run(step)
        for _, chunk in step:
            chunk.slot.length += chunk.num_tokens
        sampling = time.perf_counter()
        if output.sampled:
            self._sample(output.logits, output.sampled)
        ended = time.perf_counter()
        self._steps += 1
        self._overlapped_steps += output.num_micro_batches > 1
        self._attention_s += output.attention_s
        self._sampling_s += ended - sampling
        self._total_s += ended - started

    def _sample(self, logits: torch.Tensor, sequences: Sequence[RunningSequence]) -> None:
        token_ids, logprobs = sample(logits, [sequence.sampler for sequence in sequences])
        self._generation_tokens += len(token_ids)
        for sequence, token_id, logprob in zip(sequences, token_ids, logprobs, strict=True):
            reason = sequence.append(token_id)
            event = TokenEvent(token_id=token_id, logprob=logprob, finish_reason=reason, queued_s=sequence.queued_s)
            if reason is None:
                self._tell(sequence, event)
            else:
                self._end(sequence, event)

    def _fail(self, sequences: Sequence[RunningSequence], error: Exception) -> None:
        unavailable = isinstance(error, GroupUnavailable)
        if unavailable:
            _LOG.error("step failed: %s", error)
        else:
            _LOG.error("step failed", exc_info=error)
        event = TokenEvent(
            token_id=None,
            finish_reason="error",
            error=str(error) if unavailable else f"the engine failed: {type(error).__name__}: {error}",
            error_status=503 if unavailable else 500,
        )
        for sequence in sequences:
            if sequence.id in self._unfinished:
                self._end(sequence, event)

    def _end(self, sequence: RunningSequence, event: TokenEvent) -> None:
        """Free a sequence that the scheduler knows, and say its last word."""
        self._scheduler.remove(sequence)
        self._finish(sequence, event)

    def _finish(self, sequence: RunningSequence, event: TokenEvent) -> None:
        with self._changed:
            del self._unfinished[sequence.id]
        self._finished_at.append(time.monotonic())
        self._tell(sequence, event)

    def _tell(self, sequence: RunningSequence, event: TokenEvent) -> None:
        try:
            sequence.on_event(event)
        except Exception:
            _LOG.exception("on_event of request %d failed", sequence.id)
            self.abort(sequence.id)
