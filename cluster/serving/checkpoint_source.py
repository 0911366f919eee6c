"""Where a checkpoint's files come from: a directory, or a model of the Hugging Face hub.

From the hub, what describes the model (config, index, tokenizer) is downloaded at once, a file of weights when the
first of its tensors is read: a process gets the shards it needs and no others. Code in the repository is left there.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from experts.errors import CheckpointError
from experts.weights.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint

_DESCRIPTION = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


def checkpoint_directory(source: str, *, revision: str | None = None) -> Path:
    """The directory of `source`, a path or a hub id; from the hub without its weights.

    Raises CheckpointError saying what to do.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise CheckpointError(
            f"model.source {source!r}: no such directory; give a checkpoint directory or a hub id (organisation/name)"
        )
    return _download(source, revision, _DESCRIPTION)


def open_checkpoint(source: str, *, revision: str | None = None) -> Checkpoint:
    """The checkpoint of `source`, see `checkpoint_directory`; weights from the hub are fetched as they are read."""
    directory = checkpoint_directory(source, revision=revision)
    if directory == Path(source):
        return Checkpoint(directory)
    commit = directory.name  # the snapshot's: every later file is of the same one, whatever happens to the branch
    if not (directory / INDEX_FILE).exists():
        _download(source, commit, [SINGLE_FILE])
    return Checkpoint(directory, fetch=lambda file: _download(source, commit, [file]))


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    where = repo_id if revision is None else f"{repo_id} at revision {revision}"
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{where}: access is gated; accept its terms on the hub and set HF_TOKEN or HF_TOKEN_PATH"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CheckpointError(f"{where}: not a directory here and not found on the hub: {error}") from error
    except (OSError, ValueError) as error:  # no network, hub down, cache not writable, nothing cached
        raise CheckpointError(f"{where}: cannot be fetched from the hub: {error}") from error
