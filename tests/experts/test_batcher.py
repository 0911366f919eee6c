"""Callers that meet are answered together, each with its own rows; a wrong call fails alone."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.batcher import Batcher, merge_calls
from experts.errors import ExpertNotResident
from experts.ops.cpu_backend import CpuBackend
from experts.ops.sort import sort_by_expert
from experts.shard import ExpertShard
from experts.spec import ExpertCall, ExpertKey, ExpertSpec, ExpertWeights

SPEC = ExpertSpec(hidden_size=8, intermediate_size=6)
NUM_EXPERTS = 4


class GatedShard(ExpertShard):
    """Holds its first call until `release`; counts the calls that reach it."""

    def __init__(self) -> None:
        super().__init__(SPEC, CpuBackend(SPEC))
        generator = torch.Generator().manual_seed(0)
        for layer in (0, 1):
            for expert in range(NUM_EXPERTS):
                up, down = torch.randn(12, 8, generator=generator), torch.randn(8, 6, generator=generator)
                self.load(ExpertKey(layer, expert), ExpertWeights(up_2IH=up, down_HI=down), checksum=0)
        self.entered, self.release = threading.Event(), threading.Event()
        self.calls: list[ExpertCall] = []

    def forward(self, call: ExpertCall) -> torch.Tensor:
        self.calls.append(call)
        if len(self.calls) == 1:
            self.entered.set()
            assert self.release.wait(30)
        return super().forward(call)


def random_call(seed: int, num_tokens: int, layer: int = 0, top_k: int = 2) -> ExpertCall:
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:top_k] for _ in range(num_tokens)])
    rows = sort_by_expert(ids_TK, torch.rand(num_tokens, top_k, generator=generator))
    hidden_TH = torch.randn(num_tokens, 8, generator=generator)
    return ExpertCall(layer=layer, hidden_TH=hidden_TH, **rows._asdict())


def not_resident() -> ExpertCall:
    call = random_call(0, 1)
    return ExpertCall(
        layer=0,
        hidden_TH=call.hidden_TH,
        expert_ids_S=torch.tensor([77], dtype=torch.int32),
        offsets_S1=torch.tensor([0, 1], dtype=torch.int32),
        token_rows_R=torch.zeros(1, dtype=torch.int32),
        weights_R=torch.ones(1),
    )


def run_while_busy(shard: GatedShard, calls: list[ExpertCall]) -> list[object]:
    """Answers (or errors) of `calls`, which all come while the shard computes another."""
    batcher = Batcher(shard)
    answers: list[object] = [None] * len(calls)

    def ask(index: int) -> None:
        try:
            answers[index] = batcher.run(calls[index])
        except Exception as error:
            answers[index] = error

    first = threading.Thread(target=batcher.run, args=(random_call(99, 1),))
    first.start()
    assert shard.entered.wait(30)
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    queued = threading.Event()
    while sum(len(queue) for queue in batcher._queues.values()) < len(calls):
        queued.wait(0.001)
    shard.release.set()
    for thread in (first, *threads):
        thread.join(30)
        assert not thread.is_alive()
    return answers


def test_callers_of_one_layer_run_as_one_call() -> None:
    shard = GatedShard()
    calls = [random_call(seed, num_tokens) for seed, num_tokens in enumerate((1, 5, 2, 9))]
    answers = run_while_busy(shard, calls)
    assert [len(call.hidden_TH) for call in shard.calls] == [1, 17]
    for call, answer in zip(calls, answers, strict=True):
        assert isinstance(answer, torch.Tensor)
        torch.testing.assert_close(answer, ExpertShard.forward(shard, call), rtol=1e-5, atol=1e-6)


def test_layers_stay_apart() -> None:
    shard = GatedShard()
    calls = [random_call(seed, 3, layer=seed % 2) for seed in range(6)]
    answers = run_while_busy(shard, calls)
    assert [len(call.hidden_TH) for call in shard.calls] == [1, 9, 9]
    for call, answer in zip(calls, answers, strict=True):
        assert isinstance(answer, torch.Tensor)
        torch.testing.assert_close(answer, ExpertShard.forward(shard, call), rtol=1e-5, atol=1e-6)


def test_a_wrong_call_fails_alone() -> None:
    shard = GatedShard()
    calls = [random_call(1, 2), not_resident(), random_call(2, 2)]
    answers = run_while_busy(shard, calls)
    assert isinstance(answers[1], ExpertNotResident)
    for index in (0, 2):
        answer = answers[index]
        assert isinstance(answer, torch.Tensor)
        torch.testing.assert_close(answer, ExpertShard.forward(shard, calls[index]), rtol=1e-5, atol=1e-6)


def test_a_failing_backend_fails_every_caller_and_the_next_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    shard = GatedShard()
    forward = CpuBackend.forward

    def fail(self: CpuBackend, hidden_TH: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        if len(hidden_TH) > 1:
            raise RuntimeError("out of memory")
        return forward(self, hidden_TH, *rest)

    monkeypatch.setattr(CpuBackend, "forward", fail)
    answers = run_while_busy(shard, [random_call(1, 2), random_call(2, 2)])
    assert [str(answer) for answer in answers] == ["out of memory"] * 2
    assert Batcher(shard).run(random_call(3, 1)).shape == (1, 8)


def test_a_lone_caller_runs_in_its_own_thread() -> None:
    shard = GatedShard()
    shard.release.set()
    ran_in: list[int] = []
    forward = shard.forward
    shard.forward = lambda call: (ran_in.append(threading.get_ident()), forward(call))[1]  # type: ignore[method-assign]
    batcher = Batcher(shard)
    for seed in range(3):
        batcher.run(random_call(seed, 2))
    assert ran_in == [threading.get_ident()] * 3


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, NUM_EXPERTS)), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_merged_calls_are_valid_and_complete(shapes: list[tuple[int, int]]) -> None:
    calls = [
        random_call(seed, num_tokens, top_k=top_k) for seed, (num_tokens, top_k) in enumerate(shapes) if num_tokens
    ]
    if not calls:
        return
    merged = merge_calls(calls)
    ids = merged.expert_ids_S.tolist()
    assert ids == sorted(set(ids))
    counts = merged.offsets_S1.diff()
    assert (counts > 0).all()
    got = sorted(
        zip(
            merged.expert_ids_S.repeat_interleave(counts).tolist(),
            merged.token_rows_R.tolist(),
            merged.weights_R.tolist(),
            strict=True,
        )
    )
    expected, first = [], 0
    for call in calls:
        per_row = call.expert_ids_S.repeat_interleave(call.offsets_S1.diff()).tolist()
        rows = (call.token_rows_R + first).tolist()
        expected += list(zip(per_row, rows, call.weights_R.tolist(), strict=True))
        first += len(call.hidden_TH)
    assert got == sorted(expected)
    torch.testing.assert_close(merged.hidden_TH, torch.cat([call.hidden_TH for call in calls]))
