"""Pieces joined are the whole decoded at once, and no replacement character comes before it must."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from cluster.serving.detokenizer import ByteLevelDetokenizer, WindowDetokenizer
from cluster.serving.tokenizer import Tokenizer

FIXTURES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("🙂👩‍👧你好é \n\ufffd")), min_size=0, max_size=30
)


def pieces(detokenizer: ByteLevelDetokenizer | WindowDetokenizer, token_ids: list[int]) -> list[str]:
    return [*map(detokenizer.push, token_ids), detokenizer.flush()]


@pytest.fixture(scope="session")
def byte_fallback() -> RustTokenizer:
    """As SentencePiece checkpoints have it: words with a metaspace, and every other byte as a token of its own."""
    words = ["<unk>", "▁the", "▁qui", "ck", "▁", "a", "b", ".", "你"]
    vocab = {token: index for index, token in enumerate([*words, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@FIXTURES
@given(text=TEXT)
def test_text_comes_back_whole_and_never_early(tokenizer: Tokenizer, text: str) -> None:
    got = pieces(tokenizer.detokenizer(skip_special_tokens=True), tokenizer.encode(text, add_special_tokens=False))
    assert "".join(got) == text
    for end in range(len(got)):
        assert text.startswith("".join(got[:end]))


@FIXTURES
@given(token_ids=st.lists(st.integers(0, 339), max_size=40))
@pytest.mark.parametrize("skip", [True, False])
def test_any_tokens_read_as_the_tokenizer_reads_them(tokenizer: Tokenizer, token_ids: list[int], skip: bool) -> None:
    got = pieces(tokenizer.detokenizer(skip_special_tokens=skip), token_ids)
    assert "".join(got) == tokenizer.decode(token_ids, skip_special_tokens=skip)


def test_a_character_over_several_tokens_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    by_byte = {tokenizer.token_bytes(token_id): token_id for token_id in range(340)}
    ids = [by_byte[bytes([byte])] for byte in "🙂".encode()]
    assert pieces(tokenizer.detokenizer(skip_special_tokens=True), ids) == ["", "", "", "🙂", ""]


def test_an_incomplete_character_at_the_end_is_replaced(tokenizer: Tokenizer) -> None:
    by_byte = {tokenizer.token_bytes(token_id): token_id for token_id in range(340)}
    ids = [by_byte[b"a"], *(by_byte[bytes([byte])] for byte in "🙂".encode()[:3])]
    assert pieces(tokenizer.detokenizer(skip_special_tokens=True), ids) == ["a", "", "", "", "\ufffd"]


@FIXTURES
@given(text=st.text(st.sampled_from("ab. 你é🙂"), max_size=12))
def test_byte_fallback_and_metaspaces(byte_fallback: RustTokenizer, text: str) -> None:
    token_ids = []
    for char in text:
        token = byte_fallback.token_to_id("▁" if char == " " else char)
        spelled = [byte_fallback.token_to_id(f"<0x{byte:02X}>") for byte in char.encode()]
        token_ids += [token] if token else spelled
    got = pieces(WindowDetokenizer(byte_fallback.decode), token_ids)
    assert "".join(got) == byte_fallback.decode(token_ids)
    assert "\ufffd" not in "".join(got)


def test_spaces_between_words_are_kept(byte_fallback: RustTokenizer) -> None:
    token_ids = [byte_fallback.token_to_id(token) for token in ("▁the", "▁qui", "ck", "▁the")]
    assert pieces(WindowDetokenizer(byte_fallback.decode), token_ids) == ["the", " qui", "ck", " the", ""]


def test_bytes_that_are_no_text_do_not_wait_for_ever(byte_fallback: RustTokenizer) -> None:
    token_ids = [byte_fallback.token_to_id("<0xFF>")] * 100
    detokenizer = WindowDetokenizer(byte_fallback.decode)
    got = [detokenizer.push(token_id) for token_id in token_ids]
    assert len("".join(got)) > 80
    assert set("".join(got)) == {"\ufffd"}
