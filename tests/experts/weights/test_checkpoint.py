"""Reading safetensors: the bytes that transformers wrote, and errors that name file and tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.errors import CheckpointError
from experts.weights.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.arange(4).bfloat16(),
        "c": torch.arange(8).view(4, 2).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
    }
    save_file(tensors, tmp_path / SINGLE_FILE)
    return tmp_path


@pytest.mark.parametrize("sharded", [False, True])
def test_reads_what_safetensors_reads(tiny_checkpoint: Callable[..., tuple[Path, object]], sharded: bool) -> None:
    directory, _ = tiny_checkpoint("mixtral", sharded)
    checkpoint = Checkpoint(directory)
    files = sorted(directory.glob("*.safetensors"))
    assert (len(files) > 1) is sharded
    expected = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert set(checkpoint.files) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=0)


def test_every_dtype_and_one_entry_of_a_tensor(single: Path) -> None:
    checkpoint = Checkpoint(single)
    assert checkpoint.read("b").tolist() == [0, 1, 2, 3]
    assert checkpoint.read("c").dtype is torch.float8_e4m3fn
    assert checkpoint.read("scalar").item() == 3
    assert checkpoint.read("empty").shape == (0, 5)
    before = checkpoint.bytes_read
    assert checkpoint.read("a", 1).tolist() == [3, 4, 5]
    assert checkpoint.bytes_read - before == 12


def corrupt_size(directory: Path) -> None:
    with (directory / SINGLE_FILE).open("r+b") as file:
        file.truncate((directory / SINGLE_FILE).stat().st_size - 1)


def corrupt_header(directory: Path) -> None:
    data = bytearray((directory / SINGLE_FILE).read_bytes())
    data[8:20] = b"x" * 12
    (directory / SINGLE_FILE).write_bytes(data)


def corrupt_shape(directory: Path) -> None:
    data = (directory / SINGLE_FILE).read_bytes()
    (directory / SINGLE_FILE).write_bytes(data.replace(b'"shape":[2,3]', b'"shape":[2,4]'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (corrupt_size, r"truncated, tensor '\w+' ends at byte"),
        (corrupt_header, "broken safetensors header"),
        (corrupt_shape, "tensor 'a' has not the bytes that its shape needs"),
        (lambda d: (d / SINGLE_FILE).write_bytes(b"abc"), "truncated or not a safetensors file"),
        (lambda d: (d / SINGLE_FILE).write_bytes(b"<html>" * 99), "truncated or not a safetensors file"),
        (lambda d: (d / SINGLE_FILE).unlink(), "neither model.safetensors nor"),
        (lambda d: (d / INDEX_FILE).write_text("{"), "cannot be read as JSON"),
        (lambda d: (d / INDEX_FILE).write_text('{"weight_map": {"a": "../x"}}'), "`weight_map` from tensor"),
    ],
)
def test_damage_is_named(single: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(single)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(single)
    assert str(single) in str(caught.value)


def test_missing_things_are_named(single: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        Checkpoint(tmp_path / "nowhere")
    checkpoint = Checkpoint(single)
    with pytest.raises(CheckpointError, match="tensor 'z' is in none of its"):
        checkpoint.read("z")
    with pytest.raises(CheckpointError, match=r"tensor 'a' of shape .* has no 2"):
        checkpoint.read("a", 2)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        checkpoint.config()


def test_an_index_that_lies_is_named(single: Path) -> None:
    shutil.copy(single / SINGLE_FILE, single / "part.safetensors")
    weight_map = {"a": "part.safetensors", "y": "part.safetensors", "z": "gone.safetensors"}
    (single / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint(single)
    assert checkpoint.read("a").shape == (2, 3)
    with pytest.raises(CheckpointError, match=r"part\.safetensors: tensor 'y' is missing, though"):
        checkpoint.read("y")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file, though"):
        checkpoint.read("z")


def test_a_file_cut_after_its_header_was_read(single: Path) -> None:
    checkpoint = Checkpoint(single)
    with (single / SINGLE_FILE).open("r+b") as file:
        file.truncate(200)
    last = max(("a", "b", "c"), key=lambda name: checkpoint._entry(name).offset)
    with pytest.raises(CheckpointError, match=f"truncated inside tensor '{last}'"):
        checkpoint.read(last)
