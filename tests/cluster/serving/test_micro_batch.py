from __future__ import annotations

import pytest
import torch

from cluster.serving.attention_batch import Chunk
from cluster.serving.kv_cache import KVCache, KVLayout
from cluster.serving.micro_batch import Step, build_micro_batch, halve
from cluster.serving.request import SamplingParams
from cluster.serving.sequence import RunningSequence

CPU = torch.device("cpu")
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, key_dim=2, value_dim=2, dtype=torch.float32, device=CPU)


def make_step(*sequences: tuple[int, int, int]) -> Step:
    """(tokens, of which computed, to compute now) of each sequence; token ids tell sequence and position."""
    cache = KVCache(LAYOUT, memory=1 << 24, max_num_seqs=len(sequences), max_model_len=2048)
    step = []
    for index, (total, computed, now) in enumerate(sequences):
        tokens = [1000 * index + position for position in range(total)]
        sequence = RunningSequence(
            index, tokens, SamplingParams(max_tokens=1), lambda _: None, max_model_len=2048, eos_token_ids=frozenset()
        )
        slot = cache.allocate(total + 1)
        assert slot is not None
        slot.length, sequence.slot = computed, slot
        step.append((sequence, Chunk(slot=slot, num_tokens=now)))
    return step


STEPS = {
    "two decode": [(5, 4, 1), (9, 8, 1)],
    "one prompt": [(7, 0, 7)],
    "a prompt of two": [(2, 0, 2)],
    "a prompt goes on": [(900, 400, 100)],
    "decoding in two arenas": [(5, 4, 1), (300, 299, 1), (6, 5, 1), (400, 399, 1), (7, 6, 1)],
    "mixed": [(30, 0, 30), (5, 4, 1), (300, 299, 1), (6, 5, 1), (900, 100, 64), (3, 0, 2)],
}


@pytest.mark.parametrize("name", STEPS)
def test_halves_hold_every_token_once_and_keep_order(name: str) -> None:
    step = make_step(*STEPS[name])
    first, second = halve(step)
    sizes = [sum(chunk.num_tokens for _, chunk in part) for part in (first, second)]
    assert sizes[0] <= sizes[1] <= sizes[0] + 1
    seen: dict[int, list[int]] = {}
    for part in (first, second):
        for sequence, chunk in part:
            seen.setdefault(sequence.id, []).extend(range(chunk.begin, chunk.end))
    # A sequence's tokens come in order, so that whoever attends comes after what it attends to.
    assert seen == {sequence.id: list(range(chunk.begin, chunk.end)) for sequence, chunk in step}
    kinds = [chunk.num_tokens > 1 for _, chunk in step]
    assert len({sequence.id for sequence, _ in first} & {sequence.id for sequence, _ in second}) <= any(kinds)


def test_decoding_slots_stay_side_by_side() -> None:
    step = make_step(*[(5, 4, 1)] * 8)
    for part, first_slot in zip(halve(step[::-1]), (0, 4), strict=True):
        (group,) = build_micro_batch(part, CPU).attention.decode_groups
        assert (group.first_slot, group.num_slots, group.rows_B) == (first_slot, 4, None)


def test_flat_tensors_of_the_second_half() -> None:
    step = make_step((5, 4, 1), (10, 2, 8), (6, 0, 3))
    whole = build_micro_batch(step, CPU)
    assert whole.token_ids_T.tolist() == [4, *range(1002, 1010), *range(2000, 2003)]
    assert [sequence.id for sequence in whole.sampled] == [0, 1]
    first, second = (build_micro_batch(part, CPU) for part in halve(step))
    assert first.token_ids_T.tolist() == [4, *range(1002, 1007)]
    assert second.token_ids_T.tolist() == [*range(1007, 1010), *range(2000, 2003)]
    assert second.positions_T.tolist() == [7, 8, 9, 0, 1, 2]
    # A cut prompt's next token comes from its second part alone.
    assert ([sequence.id for sequence in first.sampled], first.logits_rows.tolist()) == ([0], [0])
    assert ([sequence.id for sequence in second.sampled], second.logits_rows.tolist()) == ([1], [2])
