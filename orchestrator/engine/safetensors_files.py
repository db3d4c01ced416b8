"""The tensors of a directory's safetensors files, by name and by rows, as they are stored."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import BadModel
from strategies.source import read_json

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ONE = "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = {
    **FLOATS,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}


class SafetensorsFiles:
    """model.safetensors, or shards and an index. Files are opened when first read; several threads may read at once."""

    def __init__(self, directory: Path, model: str) -> None:
        """`model`: its name, for messages. Raises BadModel."""
        self._directory, self._model = directory, model
        self._files = _file_of_each(directory)
        self._open: dict[Path, _File] = {}
        self._opening = threading.Lock()
        self._scratch = threading.local()  # each thread's: fresh memory costs more than what is copied to it

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Rows in their stored dtype. This thread's next read may write over them. Raises BadModel."""
        file, stored = self._found(name)
        shape = stored.shape or (1,)
        rows = range(shape[0]) if rows is None else rows
        dtype = self.dtype(name)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        memory = self._memory(len(rows) * row_bytes)
        file.read_into(memory, stored.offset + rows.start * row_bytes)
        return memory.view(dtype).view(len(rows), *shape[1:])

    def find(self, name: str) -> StoredTensor | None:
        """None where there is none of that name."""
        path = self._path(name)
        return None if path is None else self._file(path).tensors.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._found(name)[1].shape

    def dtype(self, name: str) -> torch.dtype:
        stored = self._found(name)[1]
        if stored.dtype not in _DTYPES:
            raise _bad_dtype(self._model, name, stored.dtype, _DTYPES)
        return _DTYPES[stored.dtype]

    def check_float(self, name: str) -> None:
        """Raises BadModel for a tensor in any other dtype."""
        stored = self._found(name)[1]
        if stored.dtype not in FLOATS:
            raise _bad_dtype(self._model, name, stored.dtype, FLOATS)

    def _memory(self, n_bytes: int) -> Tensor:
        """uint8, this thread's own."""
        memory: Tensor | None = getattr(self._scratch, "memory", None)
        if memory is None or len(memory) < n_bytes:
            memory = self._scratch.memory = torch.empty(n_bytes, dtype=torch.uint8)
        return memory[:n_bytes]

    def _found(self, name: str) -> tuple[_File, StoredTensor]:
        path = self._path(name)
        if path is None:
            raise BadModel(f"the index in {self._directory} has no tensor {name}, which {self._model} needs")
        file = self._file(path)
        stored = file.tensors.get(name)
        if stored is None:
            raise BadModel(f"{path} has no tensor {name}, which {self._model} needs; fetch it again")
        return file, stored

    def _path(self, name: str) -> Path | None:
        """None where an index has no such tensor."""
        if self._files is None:
            return self._directory / _ONE
        return self._directory / self._files[name] if name in self._files else None

    def _file(self, path: Path) -> _File:
        with self._opening:
            if path not in self._open:
                self._open[path] = _opened(path)
            return self._open[path]


def _bad_dtype(model: str, name: str, dtype: str, known: Mapping[str, torch.dtype]) -> BadModel:
    return BadModel(f"{model}: {name} is stored as {dtype}; supported are {', '.join(known)}")


def check_files(directory: Path, model: str) -> None:
    """Raises BadModel where a file is cut short, or has weights in what another library would cast without a word."""
    for path in sorted(directory.glob("*.safetensors")):
        opened = _opened(path)
        opened.file.close()
        for name, stored in opened.tensors.items():
            if name.endswith(".weight") and stored.dtype not in FLOATS:
                raise _bad_dtype(model, name, stored.dtype, FLOATS)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    offset: int  # of its first byte


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    file: FileIO
    tensors: Mapping[str, StoredTensor]

    def read_into(self, memory: Tensor, offset: int) -> None:
        """Fills it from there on. Not through a mapping, whose page faults read a disk in small pieces."""
        left = memoryview(memory.numpy().data)
        while left:
            try:
                n_bytes = os.preadv(self.file.fileno(), [left], offset)
            except OSError as error:
                raise BadModel(
                    f"{self.path} cannot be read at byte {offset} ({error.strerror}); check the disk, or fetch it again"
                ) from None
            if not n_bytes:
                raise BadModel(
                    f"{self.path} has nothing at byte {offset}: it was cut short since it was opened; fetch it again"
                )
            left, offset = left[n_bytes:], offset + n_bytes


def _opened(path: Path) -> _File:
    """A file whose header safetensors found in order. Raises BadModel."""
    try:
        file = path.open("rb", buffering=0)  # safetensors calls any file that it cannot open missing
    except OSError as error:
        raise BadModel(f"{path} cannot be read ({error.strerror}); check its owner and mode") from None
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        file.close()
        raise BadModel(f"{path} is cut short or corrupt ({error}); fetch it again") from None
    # The format: https://github.com/huggingface/safetensors#format. safetensors itself tells no offsets.
    header_bytes = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    data = 8 + header_bytes
    tensors = {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return _File(path, file, tensors)


def _file_of_each(directory: Path) -> Mapping[str, str] | None:
    """The file that holds each tensor; None: one file has all. Raises BadModel."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(index)
    if (directory / _ONE).is_file():
        return None
    if pickles := sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern)):
        raise BadModel(
            f"{directory} holds a pickle checkpoint, {pickles[0]}: unpickling runs code from the file; "
            "convert it to safetensors (transformers' save_pretrained writes them)"
        )
    raise BadModel(f"{directory} has neither {_ONE} nor {index.name}; fetch the weights")


def _indexed(index: Path) -> Mapping[str, str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise BadModel(f"{index} has no weight_map of tensor names to files; fetch it again")
    for file in sorted(set(files.values())):
        if Path(file).name != file or not (index.parent / file).is_file():
            raise BadModel(f"{index} names {file}, which is not beside it; fetch that file")
    return files
