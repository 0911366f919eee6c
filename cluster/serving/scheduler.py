"""Which tokens of which sequences the next step computes: continuous batching with chunked prefill.

Sequences that decode come first, one token each; what is left of the step's tokens goes to prompts, first come, first
served, cut into chunks where they do not fit. A sequence is admitted when the cache has room for its whole prompt.
Where a running sequence needs room that is not there, the youngest gives its own up and is computed again later: the
oldest always goes on.
"""

from __future__ import annotations

from collections import deque

from cluster.serving.attention_batch import Chunk
from cluster.serving.kv_cache import KVCache
from cluster.serving.sequence import RunningSequence


class Scheduler:
    """Queues of the engine's thread.

    running: in order of admission; waiting: in order of arrival, those that gave up their room in front
    """

    def __init__(self, cache: KVCache, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self._cache = cache
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[RunningSequence] = deque()
        self.running: list[RunningSequence] = []
        self.num_preemptions = 0

    def add(self, sequence: RunningSequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: RunningSequence) -> None:
        """Forget a sequence, wherever it is, and free its room."""
        if sequence.slot is not None:
            self._cache.free(sequence.slot)
            sequence.slot = None
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def schedule(self) -> list[tuple[RunningSequence, Chunk]]:
        """The next step, empty where there is nothing to do."""
        decoding = [sequence for sequence in self.running if sequence.num_remaining == 1]
        for sequence in decoding:
            self._reserve_next(sequence)
        step = [(sequence, 1) for sequence in decoding if sequence.slot is not None]
        budget = self._max_num_batched_tokens - len(step)
        for sequence in self.running:
            remaining = sequence.num_remaining
            if budget and remaining > 1:
                num_tokens = min(remaining, budget)
                step.append((sequence, num_tokens))
                budget -= num_tokens
        while budget and self.waiting and len(self.running) < self._max_num_seqs:
            sequence = self.waiting[0]
            slot = self._cache.allocate(min(len(sequence.tokens) + 1, sequence.max_len))
            if slot is None:
                break
            self.waiting.popleft()
            sequence.slot = slot
            self.running.append(sequence)
            num_tokens = min(len(sequence.tokens), budget)
            step.append((sequence, num_tokens))
            budget -= num_tokens
        return [
            (sequence, Chunk(slot=sequence.slot, num_tokens=num_tokens))
            for sequence, num_tokens in step
            if sequence.slot is not None
        ]

    def _reserve_next(self, sequence: RunningSequence) -> None:
        """Room for one more token, taken from the youngest running sequences if need be, itself at last."""
        while sequence.slot is not None and not self._cache.reserve(sequence.slot, len(sequence.tokens)):
            youngest = self.running.pop()
            assert youngest.slot is not None
            self._cache.free(youngest.slot)
            youngest.slot = None
            self.waiting.appendleft(youngest)
            self.num_preemptions += 1
