from __future__ import annotations

import torch

from cluster.serving.kv_cache import KVCache, KVLayout
from cluster.serving.request import SamplingParams
from cluster.serving.scheduler import Scheduler
from cluster.serving.sequence import RunningSequence

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, key_dim=2, value_dim=2, dtype=torch.float32, device=torch.device("cpu"))


def scheduler_of(tokens: int = 1 << 16, *, max_num_seqs: int = 4, max_num_batched_tokens: int = 32) -> Scheduler:
    cache = KVCache(LAYOUT, memory=tokens * LAYOUT.bytes_per_token, max_num_seqs=max_num_seqs, max_model_len=1024)
    return Scheduler(cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


def add(scheduler: Scheduler, request_id: int, prompt: int) -> RunningSequence:
    sequence = RunningSequence(
        request_id,
        [0] * prompt,
        SamplingParams(max_tokens=500),
        lambda event: None,
        max_model_len=1024,
        eos_token_ids=frozenset(),
    )
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> list[tuple[int, int]]:
    """(request, tokens) of the next step, computed as the engine would."""
    scheduled = scheduler.schedule()
    for sequence, chunk in scheduled:
        chunk.slot.length += chunk.num_tokens
        if chunk.slot.length == len(sequence.tokens):
            sequence.tokens.append(0)
    return [(sequence.id, chunk.num_tokens) for sequence, chunk in scheduled]


def test_decodes_come_first_and_prompts_fill_the_step() -> None:
    scheduler = scheduler_of()
    add(scheduler, 0, 10)
    assert step(scheduler) == [(0, 10)]
    add(scheduler, 1, 50)
    add(scheduler, 2, 20)
    assert step(scheduler) == [(0, 1), (1, 31)]
    assert step(scheduler) == [(0, 1), (1, 19), (2, 12)]
    assert step(scheduler) == [(0, 1), (1, 1), (2, 8)]
    assert step(scheduler) == [(0, 1), (1, 1), (2, 1)]


def test_no_more_sequences_than_allowed() -> None:
    scheduler = scheduler_of(max_num_seqs=2)
    sequences = [add(scheduler, request_id, 5) for request_id in range(3)]
    assert step(scheduler) == [(0, 5), (1, 5)]
    scheduler.remove(sequences[0])
    assert step(scheduler) == [(1, 1), (2, 5)]


def test_a_prompt_waits_for_room_and_nobody_overtakes_it() -> None:
    scheduler = scheduler_of(1024)
    first = add(scheduler, 0, 20)
    add(scheduler, 1, 600)
    add(scheduler, 2, 5)
    assert step(scheduler) == [(0, 20)]
    assert step(scheduler) == [(0, 1)]
    scheduler.remove(first)
    assert step(scheduler) == [(1, 32)]


def test_the_youngest_gives_way_and_the_oldest_goes_on() -> None:
    scheduler = scheduler_of(1024, max_num_batched_tokens=1024)
    sequences = [add(scheduler, request_id, 255) for request_id in range(4)]
    assert step(scheduler) == [(0, 255), (1, 255), (2, 255), (3, 255)]
    assert step(scheduler) == [(0, 1), (1, 1), (2, 1), (3, 1)]
    # Each now needs a slot of 512, and there is room for two.
    assert step(scheduler)[0] == (0, 1)
    assert scheduler.num_preemptions > 0
    assert [sequence.id for sequence in scheduler.waiting] == sorted(s.id for s in scheduler.waiting)
    for _ in range(200):
        step(scheduler)
    assert len(sequences[0].tokens) > 400
    scheduler.remove(sequences[0])
    before = len(sequences[1].tokens)
    step(scheduler)
    step(scheduler)
    assert len(sequences[1].tokens) > before


def test_remove_frees_running_and_waiting() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    running, waiting = add(scheduler, 0, 5), add(scheduler, 1, 5)
    step(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert not scheduler.running
    assert not scheduler.waiting
    assert step(scheduler) == []
