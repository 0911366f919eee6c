from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from transformers import MixtralConfig, MixtralForCausalLM

from cluster.serving import checkpoint_source
from cluster.serving.checkpoint_source import checkpoint_directory, open_checkpoint
from experts.errors import CheckpointError


class Hub:
    """Stands in for `snapshot_download`: copies matching files of a directory into a snapshot."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self._repository = repository
        self._snapshot = cache / "snapshots" / "4f2c"
        self.asked: list[tuple[str | None, list[str]]] = []

    def __call__(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        if repo_id != "acme/tiny":
            response = httpx.Response(404, request=httpx.Request("GET", f"https://hub/{repo_id}"))
            raise RepositoryNotFoundError("404 Repository Not Found", response=response)
        self.asked.append((revision, allow_patterns))
        self._snapshot.mkdir(parents=True, exist_ok=True)
        for file in self._repository.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, self._snapshot)
        return str(self._snapshot)

    @property
    def files(self) -> set[str]:
        return {file.name for file in self._snapshot.iterdir()}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    directory = tmp_path / "repository"
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=64,
    )
    MixtralForCausalLM(config).save_pretrained(directory, max_shard_size="30KB")
    (directory / "modeling_evil.py").write_text("raise SystemExit")
    return directory


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert checkpoint_directory(str(tmp_path)) == tmp_path


def test_shards_are_fetched_when_read(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(sharded, tmp_path / "cache")
    monkeypatch.setattr(checkpoint_source, "snapshot_download", hub)
    checkpoint = open_checkpoint("acme/tiny", revision="main")
    assert {"config.json", "model.safetensors.index.json"} <= hub.files
    assert not [file for file in hub.files if file.endswith((".safetensors", ".py"))]
    name = "model.norm.weight"
    assert torch.equal(checkpoint.read(name), torch.ones(32))
    assert [file for file in hub.files if file.endswith(".safetensors")] == [checkpoint.files[name]]
    assert len(set(checkpoint.files.values())) > 1
    assert [revision for revision, _ in hub.asked] == ["main", "4f2c"]


def test_a_single_file_is_fetched_whole(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_source, "snapshot_download", Hub(tiny_checkpoint("mixtral"), tmp_path))
    assert open_checkpoint("acme/tiny").shape("model.embed_tokens.weight") == (272, 64)


@pytest.mark.parametrize(
    ("source", "words"), [("./nothing", "no such directory"), ("nothing", "hub id"), ("acme/gone", "not found")]
)
def test_what_is_nowhere_is_an_error_that_names_it(
    source: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_source, "snapshot_download", Hub(tmp_path, tmp_path / "cache"))
    with pytest.raises(CheckpointError, match=words) as raised:
        open_checkpoint(source)
    assert source in str(raised.value)
