"""Weights by their Hugging Face names, each rank reading only its own rows and columns.

Three sources behind one Protocol: safetensors directories, GGUF files, and random weights for a spec alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cluster.errors import BadModel
from orchestrator.engine.gguf_checkpoint import GgufCheckpoint
from strategies.source import ModelSource, SourceKind, read_json
from strategies.spec import ModelSpec
from strategies.tensor_shapes import check_shape, tensor_shapes

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = ("F64", "F32", "F16", "BF16")


class Checkpoint(Protocol):
    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        """The asked slice of a tensor, all of it by default, in a floating dtype. Raises BadModel."""


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

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        self.spec = spec
        self._directory = directory
        self._shapes = tensor_shapes(spec)
        self._files = _file_of_each(directory, self._shapes)
        self._open: dict[Path, tuple[Any, frozenset[str]]] = {}  # handle, and what the file holds

    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        part: Tensor = self._checked(name)[_index(rows, cols, len(self._shapes[name]))]
        return part

    def verify(self) -> None:
        """Raises BadModel unless every tensor of the spec is there, in its shape. Reads headers only."""
        for name in self._shapes:
            self._checked(name)

    def _checked(self, name: str) -> Any:
        """safetensors' handle on one tensor, of which an index reads a slice."""
        path = self._file(name)
        try:
            if path not in self._open:
                self._open[path] = _opened(path)
            file, names = self._open[path]
            part = file.get_slice(name) if name in names else None
        except (SafetensorError, OSError) as error:
            raise BadModel(f"{path} is cut short or corrupt ({error}); fetch it again") from None
        if part is None:
            raise BadModel(f"{path} has no tensor {name}, which {self.spec.name} needs; fetch it again")
        check_shape(self.spec, name, tuple(part.get_shape()), self._shapes[name])
        if part.get_dtype() not in _FLOATS:
            stored, supported = part.get_dtype(), ", ".join(_FLOATS)
            raise BadModel(f"{self.spec.name}: {name} is stored as {stored}; supported are {supported}")
        return part

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise BadModel(
                f"the index in {self._directory} has no tensor {name}, which {self.spec.name} needs"
            )
        return self._directory / self._files[name]


def _opened(path: Path) -> tuple[Any, frozenset[str]]:
    """safetensors' handle on a file, and the tensors in it. Raises BadModel where it may not be read."""
    try:
        path.open("rb").close()  # safetensors calls any file that it cannot open missing
    except OSError as error:
        raise BadModel(f"{path} cannot be read ({error.strerror}); check its owner and mode") from None
    opened: Any = safe_open(path, framework="pt")
    return opened, frozenset(opened.keys())


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


class DummyCheckpoint:
    """Random weights: normal with a deviation of 0.02, norms about 1. Every layout sees the same values."""

    def __init__(self, spec: ModelSpec, device: str | torch.device = "cpu", seed: int = 0) -> None:
        self.spec = spec
        self._device = torch.device(device)
        self._seed = seed
        self._shapes = tensor_shapes(spec)

    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        # Seeded by its own name: a tensor does not depend on which others a rank reads, or in what order.
        seed = zlib.crc32(f"{self._seed} {name}".encode())
        generator = torch.Generator(self._device).manual_seed(seed)
        shape, dtype = self._shapes[name], getattr(torch, self.spec.dtype)
        full = torch.randn(shape, generator=generator, device=self._device, dtype=dtype).mul_(0.02)
        if name.endswith("norm.weight"):
            full.add_(1.0)
        return full[_index(rows, cols, len(shape))]


def _index(rows: range | None, cols: range | None, dimensions: int) -> tuple[slice, ...]:
    return tuple(slice(r.start, r.stop) if r is not None else slice(None) for r in (rows, cols))[:dimensions]
