"""Layers that come from a disk: a file of packed layers, read ahead of their turn, past the page cache.

The file has no name once it is open, so nothing is left behind. It is filled through a mapping, by as many readers of
the checkpoint as there are, and read by threads in pieces into locked host memory, from where it goes to the device.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cluster.errors import BadLayout
from orchestrator.engine.host_memory import paged, pin
from strategies.offload import check_disk

PAGE = mmap.ALLOCATIONGRANULARITY
PIECE_BYTES = 8 * 2**20
READERS = 8
STAGED = 3  # layers in host memory: one on its way to the device, two that are read meanwhile


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a parameter lies in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class LayerFile:
    """Packed layers, each from a page's start on."""

    def __init__(self, directory: Path, layers: Sequence[Mapping[str, Spot]], sizes: Sequence[int]) -> None:
        """`layers`: by parameter's name, offsets within the layer; `sizes`: of each layer. Raises BadLayout."""
        self.sizes = [-(-size // PAGE) * PAGE for size in sizes]
        self._starts = [sum(self.sizes[:i]) for i in range(len(sizes))]
        self._spots = {
            name: replace(spot, offset=start + spot.offset)
            for start, layer in zip(self._starts, layers, strict=True)
            for name, spot in layer.items()
        }
        check_disk(sum(self.sizes), free_bytes(directory), str(directory))
        try:
            self._fd, self.is_direct = _opened(directory, sum(self.sizes))
        except OSError as error:
            raise _unusable(directory, error) from None
        self._mapping: mmap.mmap | None = mmap.mmap(self._fd, sum(self.sizes))

    def allocate(self, name: str) -> Tensor | None:
        """The memory of a parameter that is kept here, to be filled; None for others."""
        spot = self._spots.get(name)
        if spot is None:
            return None
        assert self._mapping is not None, "it is filled before it is read"
        found = torch.frombuffer(self._mapping, dtype=torch.uint8, count=spot.n_bytes, offset=spot.offset)
        return found.view(spot.dtype).view(spot.shape)

    def finish(self) -> None:
        """All is written; nobody holds what `allocate` gave any more."""
        assert self._mapping is not None
        self._mapping.flush()
        self._mapping = None
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def path(self) -> str:
        """By which this process can open it once more."""
        return f"/proc/self/fd/{self._fd}"

    def start(self, layer: int) -> int:
        return self._starts[layer]

    def read(self, to: memoryview, layer: int, start: int) -> None:
        """Bytes of a layer from `start` on."""
        done = 0
        while done < len(to):
            got = os.preadv(self._fd, [to[done:]], self._starts[layer] + start + done)
            if not got:
                raise OSError(f"the file of offloaded layers ends at {self._starts[layer] + start + done}")
            done += got


def _opened(directory: Path, size: int) -> tuple[int, bool]:
    """A file of that size, without a name; whether it is read past the page cache."""
    made, name = tempfile.mkstemp(dir=directory, prefix="shardwise-offload-")
    try:
        os.posix_fallocate(made, 0, size)
        try:
            return os.open(name, os.O_RDWR | os.O_DIRECT), True
        except OSError:  # tmpfs, some overlays
            return os.open(name, os.O_RDWR), False
    finally:
        os.close(made)
        os.unlink(name)


def free_bytes(directory: Path) -> int:
    """That a folder has room for, which is made if it is not there. Raises BadLayout."""
    try:
        directory.mkdir(exist_ok=True)  # not the path to it: a disk that is not mounted has none
        room = os.statvfs(directory)
    except OSError as error:
        raise _unusable(directory, error) from None
    return room.f_bavail * room.f_frsize


def _unusable(directory: Path, error: OSError) -> BadLayout:
    return BadLayout(f"--offload-dir {directory}: {error.strerror}; give a folder on a disk with room")


class Reads(Protocol):
    """How layers come from the file."""

    @property
    def told(self) -> str:
        """By whom."""

    def memory(self, n_bytes: int) -> Tensor:
        """uint8 [n_bytes] that it reads into well."""

    def begin(self, to: Tensor, layer: int, copied: torch.cuda.Event | None) -> list[Future[None]]:
        """A whole layer, in the background, once what the memory held is `copied`."""


class ThreadReads:
    """Satisfies Reads."""

    told = f"{READERS} threads"

    def __init__(self, file: LayerFile) -> None:
        self._file = file
        self._readers = ThreadPoolExecutor(READERS, "offload")

    def memory(self, n_bytes: int) -> Tensor:
        return paged(n_bytes)

    def begin(self, to: Tensor, layer: int, copied: torch.cuda.Event | None) -> list[Future[None]]:
        view = to.numpy().data

        def read(start: int) -> None:
            if copied is not None:
                copied.synchronize()
            self._file.read(view[start : start + PIECE_BYTES], layer, start)

        return [self._readers.submit(read, start) for start in range(0, len(to), PIECE_BYTES)]


class DiskLayers:
    """Reads layers ahead, in the order in which every step wants them (satisfies offload.Layers)."""

    def __init__(
        self, file: LayerFile, order: Sequence[int], *, on_gpu: bool, reads: Reads | None = None
    ) -> None:
        """`reads`: by threads, unless it is told otherwise."""
        self._file, self._reads = file, reads or ThreadReads(file)
        self._next = cycle(order)
        self._staged = [self._reads.memory(max(file.sizes)) for _ in range(min(STAGED, len(order)))]
        if on_gpu:
            for memory in self._staged:
                pin(memory)
        self._ahead: deque[tuple[int, Tensor, list[Future[None]]]] = deque()
        self._taken: Tensor | None = None
        began = time.perf_counter()
        for memory in self._staged:
            self._send_for(memory, None)
        for _, _, pieces in self._ahead:
            for piece in pieces:
                piece.result()
        read = sum(file.sizes[layer] for layer, _, _ in self._ahead)
        self.bytes_per_s = read / (time.perf_counter() - began) if read else 0.0

    def take(self, layer: int) -> Tensor:
        """The layer's bytes, once they are here; the caller calls `sent` before it takes another."""
        found, memory, pieces = self._ahead.popleft()
        assert found == layer, f"layer {found} was read ahead, not {layer}"
        for piece in pieces:
            piece.result()
        self._taken = memory
        return memory[: self._file.sizes[layer]]

    def sent(self, copied: torch.cuda.Event | None) -> None:
        """What was taken is free once it is copied."""
        assert self._taken is not None
        self._send_for(self._taken, copied)

    def whole(self, layer: int) -> Tensor:
        """Out of turn."""
        memory = paged(self._file.sizes[layer])
        self._file.read(memory.numpy().data, layer, 0)
        return memory

    def _send_for(self, memory: Tensor, copied: torch.cuda.Event | None) -> None:
        layer = next(self._next)
        pieces = self._reads.begin(memory[: self._file.sizes[layer]], layer, copied)
        self._ahead.append((layer, memory, pieces))
