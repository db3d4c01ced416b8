"""Weights by their Hugging Face names, each rank reading only its own rows and columns.

Three sources behind one Protocol: safetensors directories, GGUF files, and random weights for a spec alone.
"""

from __future__ import annotations

import json
import math
import os
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import BadModel
from orchestrator.engine.gguf_checkpoint import GgufCheckpoint
from strategies.source import ModelSource, SourceKind, read_json
from strategies.spec import ModelSpec
from strategies.tensor_shapes import check_shape, tensor_shapes

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Checkpoint(Protocol):
    chunk_bytes: int  # of a parameter, worth reading at once

    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        """The asked slice of a tensor, all of it by default, in a floating dtype. Raises BadModel.

        Several threads may read at once. What is returned may be overwritten by the same thread's next read.
        """


def open_checkpoint(source: ModelSource, spec: ModelSpec) -> SafetensorsCheckpoint | GgufCheckpoint:
    """The weights of a directory or a GGUF file; its `verify` checks every header. Raises BadModel."""
    if source.path is None:
        raise BadModel(
            f"{source.name} is built in, as sizes without weights; give a directory or a .gguf file, "
            "or use --weights dummy"
        )
    if source.kind == SourceKind.GGUF:
        return GgufCheckpoint(source.path, spec)
    return SafetensorsCheckpoint(source.path, spec)


class SafetensorsCheckpoint:
    """A directory with model.safetensors, or with shards and an index. Files are opened when first read."""

    chunk_bytes = 4 * 2**20  # little enough to be in cache still when it is copied on

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        self.spec = spec
        self._directory = directory
        self._shapes = tensor_shapes(spec)
        self._files = _file_of_each(directory, self._shapes)
        self._open: dict[Path, _File] = {}
        self._opening = threading.Lock()
        self._scratch = threading.local()  # each thread's: fresh memory costs more than what is copied to it

    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        """Reads whole rows also where columns are asked for: a disk gives whole pages, and what is left out here
        the other ranks of the host find in the page cache."""
        file, stored = self._checked(name)
        rows = range(stored.shape[0]) if rows is None else rows
        dtype = _FLOATS[stored.dtype]
        row_bytes = math.prod(stored.shape[1:]) * dtype.itemsize
        memory = self._memory(len(rows) * row_bytes)
        file.read_into(memory, stored.offset + rows.start * row_bytes)
        lines = memory.view(dtype).view(len(rows), *stored.shape[1:])
        return lines if cols is None else lines[:, cols.start : cols.stop]

    def _memory(self, n_bytes: int) -> Tensor:
        """uint8, this thread's own."""
        memory: Tensor | None = getattr(self._scratch, "memory", None)
        if memory is None or len(memory) < n_bytes:
            memory = self._scratch.memory = torch.empty(n_bytes, dtype=torch.uint8)
        return memory[:n_bytes]

    def verify(self) -> None:
        """Raises BadModel unless every tensor of the spec is there, in its shape. Reads headers only."""
        for name in self._shapes:
            self._checked(name)

    def _checked(self, name: str) -> tuple[_File, _Stored]:
        path = self._path(name)
        with self._opening:
            if path not in self._open:
                self._open[path] = _opened(path)
            file = self._open[path]
        stored = file.tensors.get(name)
        if stored is None:
            raise BadModel(f"{path} has no tensor {name}, which {self.spec.name} needs; fetch it again")
        check_shape(self.spec, name, stored.shape, self._shapes[name])
        if stored.dtype not in _FLOATS:
            supported = ", ".join(_FLOATS)
            raise BadModel(f"{self.spec.name}: {name} is stored as {stored.dtype}; supported are {supported}")
        return file, stored

    def _path(self, name: str) -> Path:
        if name not in self._files:
            raise BadModel(
                f"the index in {self._directory} has no tensor {name}, which {self.spec.name} needs"
            )
        return self._directory / self._files[name]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a tensor lies in its file."""

    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    offset: int  # of its first byte


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    file: FileIO
    tensors: Mapping[str, _Stored]

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
        name: _Stored(entry["dtype"], tuple(entry["shape"]), data + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return _File(path, file, tensors)


def _file_of_each(directory: Path, names: Mapping[str, object]) -> Mapping[str, str]:
    """The file that holds each tensor. Raises BadModel."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(index)
    if (directory / "model.safetensors").is_file():
        return dict.fromkeys(names, "model.safetensors")
    if pickles := sorted(file.name for pattern in _PICKLES for file in directory.glob(pattern)):
        raise BadModel(
            f"{directory} holds a pickle checkpoint, {pickles[0]}: unpickling runs code from the file; "
            "convert it to safetensors (transformers' save_pretrained writes them)"
        )
    raise BadModel(f"{directory} has neither model.safetensors nor {index.name}; fetch the weights")


def _indexed(index: Path) -> Mapping[str, str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise BadModel(f"{index} has no weight_map of tensor names to files; fetch it again")
    for file in sorted(set(files.values())):
        if not (index.parent / file).is_file():
            raise BadModel(f"{index} names {file}, which is not beside it; fetch that file")
    return files


_WINDOWS = 4_194_301
"""Places where a dummy's row may begin: a prime, so that steps of _STEP come to each before they come to one again."""
_STEP = 1_618_033


class DummyCheckpoint:
    """Random weights: normal with a deviation of 0.02, norms about 1. Every layout and device sees the same values.

    Each row is a window of one long line of random numbers, so a slice costs no more than copying it: 1.3 GB/s on a
    core, where drawing the whole tensor anew makes 0.2 (Xeon, bfloat16, 2026-11-22).
    """

    chunk_bytes = 256 * 2**20  # a GPU makes it in a moment; what the host does for each counts

    def __init__(self, spec: ModelSpec, device: str | torch.device = "cpu", seed: int = 0) -> None:
        self.spec = spec
        self._device = torch.device(device)
        self._seed = seed
        self._shapes = tensor_shapes(spec)
        longest = max(shape[-1] for shape in self._shapes.values())
        # Drawn on the CPU: GPUs draw others from the same seed.
        line = torch.randn(_WINDOWS + longest, generator=torch.Generator().manual_seed(0)).mul_(0.02)
        self._line = line.to(self._device, getattr(torch, spec.dtype))

    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        shape = self._shapes[name]
        rows = range(shape[0]) if rows is None else rows
        first = zlib.crc32(f"{self._seed} {name}".encode()) % _WINDOWS
        if len(shape) == 1:
            values = self._line[first + rows.start : first + rows.stop]
            return values + 1 if name.endswith("norm.weight") else values
        cols = range(shape[1]) if cols is None else cols
        starts = (first + torch.arange(rows.start, rows.stop, device=self._device) * _STEP) % _WINDOWS
        if self._device.type == "cuda":  # where index_select would first write out every window there is
            return self._line[starts[:, None] + torch.arange(cols.start, cols.stop, device=self._device)]
        return self._line.unfold(0, len(cols), 1).index_select(0, starts + cols.start)
