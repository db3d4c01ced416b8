"""Weights by their Hugging Face names, each rank reading only its own rows and columns.

Three sources behind one Protocol: safetensors directories, GGUF files, and random weights for a spec alone.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import BadModel
from orchestrator.engine.gguf_checkpoint import GgufCheckpoint
from orchestrator.engine.published import PublishedCheckpoint
from orchestrator.engine.safetensors_files import SafetensorsFiles
from strategies.source import ModelSource, SourceKind
from strategies.spec import ModelSpec
from strategies.tensor_shapes import check_shape, tensor_shapes


class Checkpoint(Protocol):
    chunk_bytes: int  # of a parameter, worth reading at once

    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        """The asked slice of a tensor, all of it by default, in a floating dtype. Raises BadModel.

        Several threads may read at once. What is returned may be overwritten by the same thread's next read.
        """


def open_checkpoint(
    source: ModelSource, spec: ModelSpec
) -> SafetensorsCheckpoint | PublishedCheckpoint | GgufCheckpoint:
    """The weights of a directory or a GGUF file; its `verify` checks every header. Raises BadModel."""
    if source.path is None:
        raise BadModel(
            f"{source.name} is built in, as sizes without weights; give a directory or a .gguf file"
        )
    if source.kind == SourceKind.GGUF:
        return GgufCheckpoint(source.path, spec)
    if spec.published is not None:
        return PublishedCheckpoint(source.path, spec)
    return SafetensorsCheckpoint(source.path, spec)


class SafetensorsCheckpoint:
    """A directory with model.safetensors, or with shards and an index, in floating dtypes."""

    chunk_bytes = 4 * 2**20  # little enough to be in cache still when it is copied on

    def __init__(self, directory: Path, spec: ModelSpec) -> None:
        self.spec = spec
        self._shapes = tensor_shapes(spec)
        self._files = SafetensorsFiles(directory, spec.name)

    def read(self, name: str, rows: range | None = None, cols: range | None = None) -> Tensor:
        """Reads whole rows also where columns are asked for: a disk gives whole pages, and what is left out here
        the other ranks of the host find in the page cache."""
        self._check(name)
        lines = self._files.read(name, rows)
        return lines if cols is None else lines[:, cols.start : cols.stop]

    def verify(self) -> None:
        """Raises BadModel unless every tensor of the spec is there, in its shape. Reads headers only."""
        for name in self._shapes:
            self._check(name)

    def _check(self, name: str) -> None:
        check_shape(self.spec, name, self._files.shape(name), self._shapes[name])
        self._files.check_float(name)


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
