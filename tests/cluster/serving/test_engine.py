from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cluster.serving.engine import Engine
from cluster.serving.kv_cache import Arena
from cluster.serving.model_runner import OverlapThresholds
from cluster.serving.request import SamplingParams, TokenEvent
from cluster.serving.skeleton import ModelSkeleton
from experts.errors import ConfigError, GroupUnavailable, QueueFull, RequestError

Connect = Callable[[str], tuple[ModelSkeleton, Any]]

LIMITS: dict[str, int] = {
    "max_num_seqs": 16,
    "max_num_batched_tokens": 48,
    "max_model_len": 1024,
    "kv_cache_memory": 1 << 25,
    "max_queue_len": 16,
}


@contextmanager
def running_engine(
    skeleton: ModelSkeleton, overlap: OverlapThresholds | None = None, **limits: int
) -> Iterator[Engine]:
    engine = Engine(skeleton, overlap=overlap, **{**LIMITS, **limits})
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()


class Listener:
    """Collects one sequence's events."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []
        self._arrived: queue.Queue[TokenEvent] = queue.Queue()

    def __call__(self, event: TokenEvent) -> None:
        self.events.append(event)
        self._arrived.put(event)

    def next(self) -> TokenEvent:
        return self._arrived.get(timeout=60)

    def wait(self) -> list[int]:
        while self.next().finish_reason is None:
            pass
        return [event.token_id for event in self.events if event.token_id is not None]

    @property
    def last(self) -> TokenEvent:
        return self.events[-1]


def generate(engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[int]]:
    listeners = [Listener() for _ in prompts]
    for prompt, listener in zip(prompts, listeners, strict=True):
        engine.submit(prompt, params, listener)
    return [listener.wait() for listener in listeners]


def random_prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
ALWAYS = OverlapThresholds(decode_tokens=2, prefill_tokens=2)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe"])
def test_greedy_tokens_equal_generate(family: str, connected_skeleton: Connect) -> None:
    skeleton, reference = connected_skeleton(family)
    prompts = random_prompts(1, 2, 47, 48, 49, 300, 700)
    with running_engine(skeleton) as engine:
        together = generate(engine, prompts, GREEDY)
    for prompt, tokens in zip(prompts, together, strict=True):
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_together_equals_one_at_a_time(family: str, connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton(family)
    prompts = random_prompts(*(1 + 13 * index for index in range(16)))
    with running_engine(skeleton) as engine:
        together = generate(engine, prompts, GREEDY)
        alone = [generate(engine, [prompt], GREEDY)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_micro_batches_change_no_token(family: str, connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton(family)
    prompts = random_prompts(1, 2, 47, 48, 49, 300, 13)
    with running_engine(skeleton) as engine:
        expected = generate(engine, prompts, GREEDY)
    with running_engine(skeleton, overlap=ALWAYS) as engine:
        assert generate(engine, prompts, GREEDY) == expected
        times = engine.stats().times
        assert times.steps / 2 < times.overlapped_steps <= times.steps
        assert engine.stats().kv_cache_usage == 0.0


def test_preemption_changes_no_token(connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    prompts = random_prompts(250, 250, 250, 250)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    room = 1024 * skeleton.kv_layout.bytes_per_token
    with running_engine(skeleton) as engine:
        expected = generate(engine, prompts, params)
    for overlap in (None, ALWAYS):
        with running_engine(skeleton, overlap=overlap, kv_cache_memory=room) as engine:
            assert generate(engine, prompts, params) == expected
            assert engine.stats().preemptions > 0


def test_same_seed_same_tokens_whatever_else_runs(connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    prompt, *others = random_prompts(20, 5, 60, 33)
    seeded = SamplingParams(max_tokens=16, temperature=0.9, top_p=0.9, seed=7, ignore_eos=True)
    with running_engine(skeleton) as engine:
        alone = generate(engine, [prompt], seeded)[0]
        noise = [Listener() for _ in others]
        for other, listener in zip(others, noise, strict=True):
            engine.submit(other, SamplingParams(max_tokens=40, temperature=1.0, ignore_eos=True), listener)
        beside = generate(engine, [prompt], seeded)[0]
        for listener in noise:
            listener.wait()
        other_seed = generate(engine, [prompt], SamplingParams(max_tokens=16, seed=8, ignore_eos=True))[0]
    assert alone == beside
    assert alone != other_seed


def test_ends_on_eos_stop_ids_and_length(connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    (prompt,) = random_prompts(20)
    with running_engine(skeleton) as engine:
        tokens = generate(engine, [prompt], GREEDY)[0]
        stop = tokens[4]
        first = tokens.index(stop)

        def finish(params: SamplingParams) -> tuple[list[int], str | None]:
            listener = Listener()
            engine.submit(prompt, params, listener)
            return listener.wait(), listener.last.finish_reason

        stopping = {"max_tokens": 12, "temperature": 0.0, "stop_token_ids": frozenset({stop})}
        assert finish(SamplingParams(**stopping)) == (tokens[: first + 1], "stop")
        later, _ = finish(SamplingParams(**stopping, min_tokens=8))
        assert len(later) >= 8
        assert stop not in later[:7]
        assert finish(GREEDY) == (tokens, "length")


def test_a_full_context_ends_with_length(connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    (prompt,) = random_prompts(60)
    with running_engine(skeleton, max_model_len=64) as engine:
        listener = Listener()
        engine.submit(prompt, SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True), listener)
        assert len(listener.wait()) == 4
        assert listener.last.finish_reason == "length"


@pytest.mark.parametrize("overlap", [None, ALWAYS])
def test_abort_frees_at_once(overlap: OverlapThresholds | None, connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    (prompt,) = random_prompts(20)
    with running_engine(skeleton, overlap=overlap) as engine:
        listener = Listener()
        request_id = engine.submit(prompt, SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True), listener)
        listener.next()
        engine.abort(request_id)
        listener.wait()
        assert listener.last.finish_reason == "abort"
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0.0)
        engine.abort(request_id)
        assert generate(engine, [prompt], GREEDY)[0]


def test_bad_prompts_name_the_field(connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    with running_engine(skeleton, max_model_len=64) as engine:
        for prompt, words in [([], "empty"), ([1] * 64, "64 tokens"), ([5, 272], "272"), ([-1], "-1")]:
            with pytest.raises(RequestError, match=words) as raised:
                engine.submit(prompt, GREEDY, Listener())
            assert raised.value.field == "prompt"


def test_a_full_queue_says_when_to_come_back(connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    (prompt,) = random_prompts(5)
    long = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
    with running_engine(skeleton, max_num_seqs=1, max_queue_len=1) as engine:
        ids = [engine.submit(prompt, long, Listener()) for _ in range(2)]
        with pytest.raises(QueueFull) as raised:
            engine.submit(prompt, long, Listener())
        assert raised.value.retry_after_s > 0
        for request_id in ids:
            engine.abort(request_id)


@pytest.mark.parametrize(("overlap", "lost_call"), [(None, 0), (ALWAYS, 0), (ALWAYS, 1), (ALWAYS, 3)])
def test_a_lost_group_fails_only_those_in_the_step(
    overlap: OverlapThresholds | None, lost_call: int, connected_skeleton: Connect
) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    router = skeleton.connection.router
    assert router is not None
    (prompt,) = random_prompts(5)

    class LosesOnce:
        def __init__(self) -> None:
            self.calls = itertools.count()

        def route(self, layer: int, hidden_TH: torch.Tensor) -> Any:
            if next(self.calls) == lost_call:
                raise GroupUnavailable("expert group 3 did not come back within 1 s", 3)
            return router.route(layer, hidden_TH)

    skeleton.connect(LosesOnce())  # type: ignore[arg-type]
    with running_engine(skeleton, overlap=overlap) as engine:
        listener = Listener()
        engine.submit(prompt, GREEDY, listener)
        listener.wait()
        assert (listener.last.finish_reason, listener.last.error_status) == ("error", 503)
        assert "group 3" in (listener.last.error or "")
        assert len(generate(engine, [prompt], GREEDY)[0]) == 12
        assert engine.stats().kv_cache_usage == 0.0


def test_a_request_for_whose_cache_there_is_no_memory_fails(
    connected_skeleton: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    (prompt,) = random_prompts(5)
    with running_engine(skeleton) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "_zeros", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no memory")))
            listener = Listener()
            engine.submit(prompt, GREEDY, listener)
            listener.wait()
        assert (listener.last.finish_reason, listener.last.error_status) == ("error", 500)
        assert "lower engine.kv_cache_memory" in (listener.last.error or "")
        assert len(generate(engine, [prompt], GREEDY)[0]) == 12


def test_limits_that_contradict_are_refused(connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    for limits, words in [
        ({"max_model_len": 4096}, "max_position_embeddings"),
        ({"max_num_batched_tokens": 8}, "max_num_seqs"),
        ({"kv_cache_memory": 1000}, "kv_cache_memory"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Engine(skeleton, **{**LIMITS, **limits})


@pytest.mark.parametrize("overlap", [None, ALWAYS])
def test_stop_aborts_what_is_unfinished(overlap: OverlapThresholds | None, connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    listeners = [Listener(), Listener()]
    with running_engine(skeleton, overlap=overlap) as engine:
        for prompt, listener in zip(random_prompts(5, 30), listeners, strict=True):
            engine.submit(prompt, SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True), listener)
        for listener in listeners:
            listener.next()
    assert [listener.last.finish_reason for listener in listeners] == ["abort", "abort"]
