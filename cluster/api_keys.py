"""The keys that `http.api_keys_file` holds."""

from __future__ import annotations

from pathlib import Path

from experts.errors import ConfigError


def read_api_keys(path: str | None) -> list[str] | None:
    """The keys in `path`, one a line; None without a path.

    Raises ConfigError where it cannot be read, holds none, or one that no header can carry.
    """
    if path is None:
        return None
    todo = "give a text file with one key a line"
    try:
        keys = Path(path).read_text(encoding="utf-8").split()
    except OSError as error:
        raise ConfigError(f"http.api_keys_file: {path}: {error.strerror}; {todo}") from None
    except ValueError:  # not UTF-8, or no path at all
        raise ConfigError(f"http.api_keys_file: {path}: not UTF-8 text; {todo}") from None
    if not keys:
        raise ConfigError(f"http.api_keys_file: {path}: holds no key; {todo}")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ConfigError(f"http.api_keys_file: {path}: a key has characters beyond printable ASCII; {todo}")
    return keys
