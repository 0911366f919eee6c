"""The key file: what is wrong with it is said with the key of mesh.yaml and the path."""

from pathlib import Path

import pytest

from cluster.api_keys import read_api_keys
from experts.errors import ConfigError


def test_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\ntwo\n")
    assert read_api_keys(str(file)) == ["one", "two"]
    assert read_api_keys(None) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"\xff\xfe\x00", "not UTF-8"), (b" \n", "holds no key"), ("ключ".encode(), "ASCII")],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_api_keys(str(file))
    assert str(caught.value).startswith(f"http.api_keys_file: {file}: ")
    assert words in str(caught.value)
