"""Stop strings against a reference that reads one character at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.serving.request import TokenLogprob
from cluster.serving.text_stream import TextStream

WORDS = st.lists(st.text("ab", max_size=4), max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4).map(tuple)


class Words:
    """Tokens are indices of a list of words; the flush gives `tail`."""

    def __init__(self, words: list[str], tail: str = "") -> None:
        self._words = words
        self._tail = tail

    def push(self, token_id: int) -> str:
        return self._words[token_id]

    def flush(self) -> str:
        return self._tail


def cut(text: str, stops: tuple[str, ...], *, include_stop: bool) -> tuple[str, bool]:
    """Read character by character until some stop string is there; of several the longest."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end if include_stop else end - max(map(len, ending))], True
    return text, False


def run(stream: TextStream, num_words: int) -> tuple[list[str], bool]:
    pieces = []
    for token_id in range(num_words):
        stopped = stream.push(token_id)
        pieces.append(stream.take()[0])
        if stopped:
            return pieces, True
    stopped = stream.finish()
    return [*pieces, stream.take()[0]], stopped


@given(words=WORDS, tail=st.text("ab", max_size=2), stops=STOPS, include_stop=st.booleans())
def test_text_ends_at_the_first_complete_stop_string(
    words: list[str], tail: str, stops: tuple[str, ...], include_stop: bool
) -> None:
    stream = TextStream(Words(words, tail), stop=stops, include_stop=include_stop)
    pieces, stopped = run(stream, len(words))
    assert ("".join(pieces), stopped) == cut("".join(words) + tail, stops, include_stop=include_stop)


@given(words=WORDS, stops=STOPS)
def test_text_is_withheld_only_while_it_may_begin_a_stop_string(words: list[str], stops: tuple[str, ...]) -> None:
    stream = TextStream(Words(words), stop=stops)
    seen = ""
    for token_id in range(len(words)):
        if stream.push(token_id):
            return
        seen += stream.take()[0]
        text = "".join(words[: token_id + 1])
        withheld = text.removeprefix(seen)
        assert text == seen + withheld
        assert not withheld or any(stop.startswith(withheld) for stop in stops)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    stream = TextStream(Words(["a", "b", "a", "b"]), stop=("ab",), min_tokens=3)
    assert run(stream, 4) == (["a", "b", "", ""], True)


def test_logprobs_come_with_their_text_and_end_with_it() -> None:
    words = ["x", "ab", "y", "a", "bc"]
    stream = TextStream(Words(words), stop=("abc",))
    taken = []
    for token_id in range(len(words)):
        stopped = stream.push(token_id, TokenLogprob(token_id=token_id, logprob=-1.0))
        text, logprobs = stream.take()
        taken.append((text, [(placed.text_offset, placed.logprob.token_id) for placed in logprobs]))
    assert stopped
    assert taken == [("x", [(0, 0)]), ("", []), ("aby", [(1, 1), (3, 2)]), ("", []), ("", [])]


def test_logprobs_of_tokens_without_text_come_at_the_end() -> None:
    stream = TextStream(Words(["x", ""]))
    for token_id in range(2):
        stream.push(token_id, TokenLogprob(token_id=token_id, logprob=-1.0))
    assert not stream.finish()
    assert [placed.text_offset for placed in stream.take()[1]] == [0, 1]
