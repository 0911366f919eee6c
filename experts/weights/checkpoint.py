"""A directory of safetensors files, read tensor by tensor (github.com/huggingface/safetensors#format).

Files are read with `pread` at the offsets that their headers give: exactly the bytes asked for, from several
threads at once, and an error can name the file and the tensor.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experts.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where one tensor lies: `offset` counts from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint:
    """Tensors of a checkpoint directory by name. Thread-safe; files' headers are read when first needed.

    fetch:      called with the name of a file that is listed and not there yet, before it is opened
    files:      tensor name -> file name, of every tensor
    bytes_read: tensor bytes read so far

    Raises CheckpointError, here and in every method, naming the file and the tensor.
    """

    def __init__(self, directory: str | os.PathLike[str], *, fetch: Callable[[str], object] | None = None) -> None:
        self.directory = Path(directory)
        self._fetch = fetch
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._headers: dict[str, Mapping[str, _Entry]] = {}
        self.files: Mapping[str, str] = self._list_files()

    def config(self) -> Mapping[str, Any]:
        """The directory's config.json."""
        config = _read_json(self.directory / "config.json", "every Hugging Face checkpoint has one")
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.directory / 'config.json'}: a JSON object expected")
        return config

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from its file's header."""
        return self._entry(name).shape

    def nbytes(self, name: str) -> int:
        """Size of a tensor."""
        return self._entry(name).nbytes

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        if name not in self.files:
            raise CheckpointError(
                f"{self.directory}: tensor {name!r} is in none of its safetensors files; "
                "the download is incomplete or config.json belongs to another model"
            )
        return self.directory / self.files[name]

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor in the checkpoint's dtype, or only entry `index` of its first dimension."""
        entry = self._entry(name)
        shape, offset, nbytes = entry.shape, entry.offset, entry.nbytes
        if index is not None:
            if not shape or not 0 <= index < shape[0]:
                raise CheckpointError(f"{self.path(name)}: tensor {name!r} of shape {list(shape)} has no {index}")
            nbytes //= shape[0]
            offset += index * nbytes
            shape = shape[1:]
        data = torch.empty(nbytes, dtype=torch.uint8)
        self._pread(name, memoryview(data.numpy().data), offset)
        return data.view(entry.dtype).view(shape)

    def _pread(self, name: str, buffer: memoryview, offset: int) -> None:
        path, done = self.path(name), 0
        try:
            file = os.open(path, os.O_RDONLY)
            try:
                while done < len(buffer):
                    count = os.preadv(file, [buffer[done:]], offset + done)
                    if not count:
                        raise CheckpointError(f"{path}: truncated inside tensor {name!r}; download it again")
                    done += count
            finally:
                os.close(file)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read tensor {name!r}: {error.strerror}") from error
        with self._lock:
            self.bytes_read += done

    def _entry(self, name: str) -> _Entry:
        path = self.path(name)
        if self._fetch is not None and not path.exists():
            self._fetch(path.name)
        with self._lock:
            header = self._headers.get(path.name)
            if header is None:
                header = self._headers[path.name] = _read_header(path)
        if name not in header:
            raise CheckpointError(
                f"{path}: tensor {name!r} is missing, though {INDEX_FILE} says it is there; download both again"
            )
        return header[name]

    def _list_files(self) -> Mapping[str, str]:
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: no such directory; give a Hugging Face checkpoint directory")
        if (self.directory / INDEX_FILE).exists():
            index = _read_json(self.directory / INDEX_FILE, "")
            files = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(files, dict) or not all(
                isinstance(file, str) and Path(file).name == file for file in files.values()
            ):
                raise CheckpointError(
                    f"{self.directory / INDEX_FILE}: `weight_map` from tensor names to file names expected"
                )
            return files
        if not (self.directory / SINGLE_FILE).exists():
            raise CheckpointError(
                f"{self.directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; only safetensors "
                "checkpoints are read (`save_pretrained` writes them)"
            )
        header = self._headers[SINGLE_FILE] = _read_header(self.directory / SINGLE_FILE)
        return dict.fromkeys(header, SINGLE_FILE)


def _read_json(path: Path, hint: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def _read_header(path: Path) -> Mapping[str, _Entry]:
    """Entries of a safetensors file; each extent is checked against its shape and the file's size."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: truncated or not a safetensors file; download it again")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            data = 8 + length
            entries = {}
            for name, value in header.items():
                start, end = value["data_offsets"]
                if value["dtype"] not in _DTYPES:
                    raise CheckpointError(f"{path}: tensor {name!r} has dtype {value['dtype']}, which is not read")
                entry = _Entry(_DTYPES[value["dtype"]], tuple(value["shape"]), data + start, end - start)
                if entry.nbytes != math.prod(entry.shape) * entry.dtype.itemsize:
                    raise CheckpointError(f"{path}: tensor {name!r} has not the bytes that its shape needs")
                if data + end > size:
                    raise CheckpointError(
                        f"{path}: truncated, tensor {name!r} ends at byte {data + end} of {size}; download it again"
                    )
                entries[name] = entry
            return entries
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file, though {INDEX_FILE} names it; download it") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: broken safetensors header ({error}); download it again") from error
