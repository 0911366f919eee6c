from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cluster.serving.attention_batch import Chunk
from cluster.serving.kv_cache import KVCache
from cluster.serving.micro_batch import build_micro_batch
from cluster.serving.model_runner import ModelRunner, OverlapThresholds
from cluster.serving.request import SamplingParams
from cluster.serving.sequence import RunningSequence
from cluster.serving.skeleton import ModelSkeleton
from experts.errors import GroupUnavailable, RequestError

Connect = Callable[[str], tuple[ModelSkeleton, Any]]
ALWAYS = OverlapThresholds(decode_tokens=2, prefill_tokens=2)
# (prompt, chunks): chunks of a step are computed together; 0 sits a step out.
SEQUENCES = [
    (40, [40, 1, 1, 1]),
    (300, [100, 0, 200, 1]),
    (3, [3, 1, 1, 1]),
    (90, [0, 50, 40, 1]),
    (61, [0, 61, 0, 1]),
]


class Sequences:
    """The same sequences for any runner, each with a cache of its own."""

    def __init__(self, skeleton: ModelSkeleton) -> None:
        self.cache = KVCache(skeleton.kv_layout, memory=1 << 26, max_num_seqs=8, max_model_len=2048)
        generator = torch.Generator().manual_seed(3)
        self.members = []
        for index, (length, chunks) in enumerate(SEQUENCES):
            tokens = torch.randint(0, 256, (length + len(chunks),), generator=generator).tolist()
            sequence = RunningSequence(
                index,
                tokens,
                SamplingParams(max_tokens=1),
                lambda _: None,
                max_model_len=2048,
                eos_token_ids=frozenset(),
            )
            sequence.slot = self.cache.allocate(len(tokens))
            self.members.append((sequence, tokens, chunks))

    def step(self, number: int) -> list[tuple[RunningSequence, Chunk]]:
        step = []
        for sequence, tokens, chunks in self.members:
            if chunks[number]:
                assert sequence.slot is not None
                chunk = Chunk(slot=sequence.slot, num_tokens=chunks[number])
                sequence.tokens = tokens[: chunk.end]
                step.append((sequence, chunk))
        return step

    def advance(self, step: list[tuple[RunningSequence, Chunk]]) -> None:
        for _, chunk in step:
            chunk.slot.length += chunk.num_tokens


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3", "olmoe", "gpt_oss", "grok-1"])
def test_two_micro_batches_give_the_logits_of_one(family: str, connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton(family)
    whole, halves = ModelRunner(skeleton, None), ModelRunner(skeleton, ALWAYS)
    with torch.inference_mode():
        alone, together = Sequences(skeleton), Sequences(skeleton)
        for number in range(4):
            steps = alone.step(number), together.step(number)
            expected, output = whole.run(steps[0]), halves.run(steps[1])
            assert (expected.num_micro_batches, output.num_micro_batches) == (1, 2)
            rows = {sequence.id: row for sequence, row in zip(output.sampled, output.logits, strict=True)}
            assert sorted(rows) == sorted(sequence.id for sequence in expected.sampled)
            for sequence, row in zip(expected.sampled, expected.logits, strict=True):
                torch.testing.assert_close(rows[sequence.id], row, rtol=0, atol=1e-4)
            alone.advance(steps[0])
            together.advance(steps[1])
        for one, other in zip(alone.cache.arenas, together.cache.arenas, strict=True):
            torch.testing.assert_close(other.key, one.key, rtol=0, atol=1e-4)
            torch.testing.assert_close(other.value, one.value, rtol=0, atol=1e-4)


class Diary:
    """Passes calls on and writes down what was sent, taken and cancelled; `fail_at` is the first `taken` to fail."""

    def __init__(self, router: Any, fail_at: int | None = None, error: Exception | None = None) -> None:
        self._router = router
        self._fail_at = fail_at
        self._error = error
        self.lines: list[str] = []
        self.taken = 0

    def route(self, layer: int, hidden_TH: torch.Tensor) -> Any:
        return self._out(layer, hidden_TH, self._router.route(layer, hidden_TH))

    def dispatch(self, layer: int, hidden_TH: torch.Tensor, *choice: torch.Tensor) -> Any:
        return self._out(layer, hidden_TH, self._router.dispatch(layer, hidden_TH, *choice))

    def _out(self, layer: int, hidden_TH: torch.Tensor, pending: Any) -> Any:
        diary, what = self, f"{layer} of {len(hidden_TH)}"
        self.lines.append(f"sent {what}")

        class Out:
            def result(self) -> torch.Tensor:
                diary.taken += 1
                diary.lines.append(f"taken {what}")
                if diary._error is not None and diary.taken - 1 == diary._fail_at:
                    raise diary._error
                return pending.result()  # type: ignore[no-any-return]

            def cancel(self) -> None:
                diary.lines.append(f"cancelled {what}")

        return Out()


@pytest.fixture
def diary_of(connected_skeleton: Connect) -> Callable[..., Any]:
    """(family, fail_at, error) -> (skeleton, its router's diary)."""

    def connect(family: str, *failing: Any) -> tuple[ModelSkeleton, Diary]:
        skeleton, _ = connected_skeleton(family)
        router = skeleton.connection.router
        assert router is not None
        diary = Diary(router, *failing)
        skeleton.connect(diary)
        return skeleton, diary

    return connect


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_one_works_while_the_others_experts_are_out(family: str, diary_of: Callable[..., Any]) -> None:
    skeleton, diary = diary_of(family)
    with torch.inference_mode():
        ModelRunner(skeleton, ALWAYS).run(Sequences(skeleton).step(0))
    # 40 + 100 + 3 tokens: halves of 71 and 72, of which only one waits at a time, and in the last layer those that end
    # a sequence.
    assert diary.lines == [
        "sent 0 of 71",
        "sent 0 of 72",
        *(
            line
            for layer, taken, sent in ((0, 71, 71), (0, 72, 72), (1, 71, 1), (1, 72, 2))
            for line in (f"taken {layer} of {taken}", f"sent {layer + 1} of {sent}")
        ),
        "taken 2 of 1",
        "taken 2 of 2",
    ]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_last_layer_computes_what_is_read(family: str, diary_of: Callable[..., Any]) -> None:
    skeleton, diary = diary_of(family)
    last = skeleton.connection.last_layer
    with torch.inference_mode():
        output = ModelRunner(skeleton, None).run(Sequences(skeleton).step(0))
        assert f"sent {last} of 3" in diary.lines
        batch = build_micro_batch(Sequences(skeleton).step(0), skeleton.device)
        every_row = torch.arange(batch.attention.num_tokens)
        logits = skeleton.forward(batch.token_ids_T, batch.positions_T, batch.attention, every_row)
    assert f"sent {last} of 143" in diary.lines
    torch.testing.assert_close(output.logits, logits[batch.logits_rows], rtol=0, atol=1e-5)


def test_a_step_that_ends_no_prompt_asks_no_expert_of_the_last_layer(diary_of: Callable[..., Any]) -> None:
    skeleton, diary = diary_of("mixtral")
    step = Sequences(skeleton).step(0)
    for sequence, _ in step:
        sequence.tokens += [0]  # more than the chunk
    with torch.inference_mode():
        output = ModelRunner(skeleton, None).run(step)
    assert output.logits.shape == (0, skeleton.vocab_size)
    assert diary.lines == [f"{what} {layer} of 143" for layer in (0, 1) for what in ("sent", "taken")]


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("error", [GroupUnavailable("group 3 is gone", 3), RequestError("no such layer", "layer")])
def test_an_error_in_either_half_is_the_steps(fail_at: int, error: Exception, diary_of: Callable[..., Any]) -> None:
    skeleton, diary = diary_of("mixtral", fail_at, error)
    runner = ModelRunner(skeleton, ALWAYS)
    with torch.inference_mode():
        sequences = Sequences(skeleton)
        step = sequences.step(0)
        with pytest.raises(type(error)) as raised:
            runner.run(step)
        assert raised.value is error
        assert diary.taken == fail_at + 1
        # What the other half has out is not waited for. The very last result leaves nothing out.
        assert sum("cancelled" in line for line in diary.lines) == (fail_at < 5)
        assert [slot.length for slot in (chunk.slot for _, chunk in step)] == [0, 0, 0]
        again = runner.run(step)
        torch.testing.assert_close(
            again.logits.sort(0).values,
            ModelRunner(skeleton, None).run(step).logits.sort(0).values,
            rtol=0,
            atol=1e-4,
        )


def test_thresholds_count_the_steps_tokens(connected_skeleton: Connect) -> None:
    skeleton, _ = connected_skeleton("mixtral")
    sizes = {}
    for decode_tokens, prefill_tokens in [(5, 143), (6, 144)]:
        limits = OverlapThresholds(decode_tokens=decode_tokens, prefill_tokens=prefill_tokens)
        runner = ModelRunner(skeleton, limits)
        with torch.inference_mode():
            sequences = Sequences(skeleton)
            sizes[decode_tokens] = []
            for number in range(4):
                step = sequences.step(number)
                # 143, 114 and 242 tokens with prompts, then 5 that decode.
                sizes[decode_tokens].append(runner.run(step).num_micro_batches)
                sequences.advance(step)
    assert sizes == {5: [2, 1, 2, 2], 6: [1, 1, 2, 1]}
