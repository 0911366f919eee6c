"""The tokenizer against transformers' own, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cluster.serving.tokenizer import Tokenizer, load_tokenizer
from experts.errors import CheckpointError, RequestError

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "wörld"}]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(max_size=60))
def test_same_ids_and_text_as_transformers(tokenizer_dir: Path, tokenizer: Tokenizer, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert ids == theirs(text)["input_ids"]
    assert tokenizer.decode(ids) == theirs.decode(ids)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert all(len(tokenizer.token_bytes(token_id)) <= tokenizer.max_token_bytes for token_id in ids)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_template_as_transformers_renders_it(
    tokenizer_dir: Path, tokenizer: Tokenizer, add_generation_prompt: bool
) -> None:
    theirs = AutoTokenizer.from_pretrained(tokenizer_dir).apply_chat_template(
        MESSAGES, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    ours = tokenizer.render_chat(MESSAGES, add_generation_prompt=add_generation_prompt)
    assert tokenizer.encode(ours, add_special_tokens=False) == theirs


def test_an_id_without_a_token_is_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(100_000) == b""
    assert tokenizer.detokenizer(skip_special_tokens=True).push(100_000) == ""


def test_no_chat_template(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    with pytest.raises(RequestError, match=r"no chat template.*/v1/completions"):
        load_tokenizer(tmp_path).render_chat(MESSAGES)


def test_what_the_template_refuses_is_the_callers_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no tools here") as caught:
        tokenizer.render_chat([{"role": "tool", "content": "x"}])
    assert caught.value.field == "messages"


def test_template_kwargs_cannot_replace_the_template(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="chat_template"):
        tokenizer.render_chat(MESSAGES, template_kwargs={"chat_template": "{{ 1 }}"})


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
