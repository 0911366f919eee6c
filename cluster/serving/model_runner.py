"""Runs a step through the skeleton: as one batch, or as two micro-batches that hide each other's wait for experts.

Dual batch overlap: while the experts of one micro-batch are out, the other computes attention, gate and shared
expert. It pays where experts take long and are elsewhere; each micro-batch reads all dense weights, and experts get
half as many tokens at a time, so that small steps are better left whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.serving.micro_batch import MicroBatch, Step, build_micro_batch, halve
from cluster.serving.sequence import RunningSequence
from cluster.serving.skeleton import ModelSkeleton
from cluster.serving.turns import Turns

# Fewer are done with before torch's other threads are awake.
_SHARED_TOKENS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class OverlapThresholds:
    """Fewest tokens of a step that is computed as two micro-batches.

    decode_tokens: where every sequence has one token;  prefill_tokens: where a prompt is among them
    """

    decode_tokens: int
    prefill_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepOutput:
    """logits: [len(sampled), vocabulary] float32, of the sequences that get a token."""

    logits: torch.Tensor
    sampled: Sequence[RunningSequence]
    attention_s: float
    num_micro_batches: int


class ModelRunner:
    """overlap: when to use two micro-batches; None: never."""

    def __init__(self, skeleton: ModelSkeleton, overlap: OverlapThresholds | None) -> None:
        self._skeleton = skeleton
        self._overlap = overlap
        self._num_threads = torch.get_num_threads()

    def run(self, step: Step) -> StepOutput:
        """Write the step's keys and values, compute its logits; slots' lengths stay as they are.

        Raises what the router raises: GroupUnavailable, RequestError.
        """
        if not self._overlaps(step):
            parts = [self._forward(step)]
        else:
            first, second = halve(step)
            turns = Turns()
            connection = self._skeleton.connection
            alone, connection.meanwhile = connection.meanwhile, turns.hand_over
            try:
                # The first leads in every layer: `halve` wants it so.
                parts = list(turns.run(lambda: self._forward(first), lambda: self._forward(second)))
            finally:
                connection.meanwhile = alone
        return StepOutput(
            logits=torch.cat([logits for _, logits in parts]),
            sampled=[sequence for batch, _ in parts for sequence in batch.sampled],
            attention_s=sum(batch.attention.seconds for batch, _ in parts),
            num_micro_batches=len(parts),
        )

    def _overlaps(self, step: Step) -> bool:
        if self._overlap is None:
            return False
        num_tokens = sum(chunk.num_tokens for _, chunk in step)
        decodes = num_tokens == len(step)
        return num_tokens >= (self._overlap.decode_tokens if decodes else self._overlap.prefill_tokens)

    @torch.inference_mode()  # a thread's own, so the engine's does not reach the second micro-batch
    def _forward(self, step: Step) -> tuple[MicroBatch, torch.Tensor]:
        batch = build_micro_batch(step, self._skeleton.device)
        num_threads = self._num_threads if len(batch.token_ids_T) >= _SHARED_TOKENS else 1
        torch.set_num_threads(num_threads)  # a thread's own
        self._skeleton.connection.num_threads = num_threads
        logits = self._skeleton.forward(batch.token_ids_T, batch.positions_T, batch.attention, batch.logits_rows)
        return batch, logits
