"""The text of one sequence as it grows: detokenised, cut at stop strings, with its log-probabilities."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from cluster.serving.detokenizer import Detokenizer
from cluster.serving.request import TokenLogprob


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedLogprob:
    """A token's log-probability and where its text starts, in characters of the generated text."""

    text_offset: int
    logprob: TokenLogprob


class TextStream:
    """Withholds text that may turn out to be the start of a stop string.

    A match is the first to be complete, as if text came one character at a time; of two that end together the
    longer. Stop strings do not count before `min_tokens` tokens. Log-probabilities come out with their text.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._held = ""  # decoded, not yet certain
        self._fresh: list[str] = []  # certain, not yet taken
        self._num_certain = 0  # characters certain so far
        self._logprobs: deque[PlacedLogprob] = deque()
        self._ended = False

    def push(self, token_id: int, logprob: TokenLogprob | None = None) -> bool:
        """Take a token. True where it completed a stop string: the text is whole and takes no more tokens."""
        self._num_tokens += 1
        if logprob is not None:
            offset = self._num_certain + len(self._held)
            self._logprobs.append(PlacedLogprob(text_offset=offset, logprob=logprob))
        return self._extend(self._detokenizer.push(token_id))

    def finish(self) -> bool:
        """The sequence ended: what was withheld is certain. True where its end made a stop string."""
        if self._extend(self._detokenizer.flush()):
            return True
        self._release(len(self._held))
        self._ended = True
        return False

    def take(self) -> tuple[str, list[PlacedLogprob]]:
        """Text that became certain since the last call, and the log-probabilities of its tokens."""
        text = "".join(self._fresh)
        self._fresh.clear()
        logprobs = []
        while self._logprobs and (self._ended or self._logprobs[0].text_offset < self._num_certain):
            logprobs.append(self._logprobs.popleft())
        return text, logprobs

    def _extend(self, text: str) -> bool:
        self._held += text
        if not self._stop or self._num_tokens < self._min_tokens:
            self._release(len(self._held))
            return False
        match = self._first_match()
        if match is None:
            self._release(len(self._held) - self._num_undecided())
            return False
        start, end = match
        self._release(end if self._include_stop else start)
        self._held = ""
        return True

    def _first_match(self) -> tuple[int, int] | None:
        found = [(at, at + len(stop)) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        return min(found, key=lambda span: (span[1], span[0]), default=None)

    def _num_undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _release(self, length: int) -> None:
        if length:
            self._fresh.append(self._held[:length])
            self._held = self._held[length:]
            self._num_certain += length
