"""A step's tokens as the skeleton takes them, whole or cut in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cluster.serving.attention_batch import AttentionBatch, Chunk
from cluster.serving.sequence import RunningSequence

Step = Sequence[tuple[RunningSequence, Chunk]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MicroBatch:
    """Flat tensors in the order of `attention`'s rows.

    logits_rows: rows whose sequences have no token left after them;  sampled: those sequences
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    attention: AttentionBatch
    logits_rows: torch.Tensor
    sampled: tuple[RunningSequence, ...]


def build_micro_batch(step: Step, device: torch.device) -> MicroBatch:
    """One batch of all that is in `step`."""
    attention = AttentionBatch([chunk for _, chunk in step], device)
    tokens: list[int] = []
    positions: list[int] = []
    logits_rows: list[int] = []
    sampled: list[RunningSequence] = []
    for sequence, chunk in (step[index] for index in attention.order):
        tokens += sequence.tokens[chunk.begin : chunk.end]
        positions += range(chunk.begin, chunk.end)
        if chunk.end == len(sequence.tokens):
            logits_rows.append(len(tokens) - 1)
            sampled.append(sequence)
    return MicroBatch(
        token_ids_T=torch.tensor(tokens, device=device),
        positions_T=torch.tensor(positions, device=device),
        attention=attention,
        logits_rows=torch.tensor(logits_rows, device=device, dtype=torch.long),
        sampled=tuple(sampled),
    )


def halve(step: Step) -> tuple[Step, Step]:
    """Two parts of as many tokens, one at most apart; the first decodes, prompts come last.

    The prompt at the cut is in both: the second part's tokens attend to the first's, so that in every layer the
    first must write its keys and values before. Slots of decoding sequences stay together, as attention reads them.
    """
    ordered = sorted(step, key=_place)
    left = sum(chunk.num_tokens for _, chunk in ordered) // 2
    first: list[tuple[RunningSequence, Chunk]] = []
    second: list[tuple[RunningSequence, Chunk]] = []
    for sequence, chunk in ordered:
        here = min(left, chunk.num_tokens)
        rest = chunk.num_tokens - here
        left -= here
        if here:
            first.append((sequence, Chunk(slot=chunk.slot, num_tokens=here, offset=chunk.offset)))
        if rest:
            second.append((sequence, Chunk(slot=chunk.slot, num_tokens=rest, offset=chunk.offset + here)))
    return first, second


def _place(entry: tuple[RunningSequence, Chunk]) -> tuple[int, int, int]:
    """Decoding sequences by arena and slot, then prompts as they come."""
    _, chunk = entry
    return (0, chunk.slot.arena.capacity, chunk.slot.index) if chunk.num_tokens == 1 else (1, 0, 0)
