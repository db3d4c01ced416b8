"""Where the packets of a one-shot all-reduce go: the other GPUs' memory, or memory of the host that all GPUs map."""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from cluster.collectives import cuda
from cluster.pci import local_cores

NOTHING_BYTE = 0xFF
"""What memory of a pair holds where nothing has come: NOTHING in one_shot.cu, by the byte."""


@dataclass(frozen=True, slots=True)
class Wires:
    """Device addresses. Memory of a pair has one writer and one reader; shared memory has one writer, and all read it.

    A pair's is full of `NOTHING_BYTE` before any rank sends, shared memory of zeros.
    """

    to: tuple[int, ...]
    """Where this rank writes for its peers, in any order."""
    by_rank: tuple[int, ...]
    """Where each rank writes for this one; the own entry is unused."""
    shared: tuple[int, ...]
    """Where each rank writes for all; none where the transport has no such memory."""


class Transport(Protocol):
    """Made by every rank; what `offer` returns on each goes to `open` on all. Either may raise."""

    name: str

    def __init__(self, rank: int, ranks: int, pair_bytes: int, shared_bytes: int) -> None: ...
    def offer(self) -> bytes: ...
    def open(self, offers: Sequence[bytes]) -> Wires: ...
    def close(self) -> None: ...


class PeerMemory:
    """Each rank polls its own device's memory, into which the others push over peer access (NVLink, PCIe)."""

    name = "peer memory"

    def __init__(self, rank: int, ranks: int, pair_bytes: int, shared_bytes: int) -> None:
        if shared_bytes:
            raise ValueError(f"{shared_bytes} bytes that all ranks read: peer memory has none, so ask for 0")
        self._rank, self._ranks, self._region = rank, ranks, pair_bytes
        self._own = 0
        self._peers: dict[int, int] = {}

    def offer(self) -> bytes:
        self._own = cuda.allocate(self._ranks * self._region, NOTHING_BYTE)
        return cuda.export(self._own)

    def open(self, offers: Sequence[bytes]) -> Wires:
        for step in range(
            1, self._ranks
        ):  # from the next rank on, so that not all push to the same one first
            peer = (self._rank + step) % self._ranks
            self._peers[peer] = cuda.open_exported(offers[peer])
        return Wires(
            tuple(base + self._rank * self._region for base in self._peers.values()),
            tuple(self._own + rank * self._region for rank in range(self._ranks)),
            (),
        )

    def close(self) -> None:
        """The own memory stays until the process ends: to free it before every peer has closed it is undefined."""
        for base in self._peers.values():
            cuda.close_exported(base)
        self._peers.clear()


class MappedHostMemory:
    """Each rank pushes into its own part of one file in memory, which all map, and polls the others' parts.

    A part is what one rank writes: for each reader in rank order, then for all. Its own place among the readers is
    unused.
    """

    name = "mapped host memory"

    def __init__(self, rank: int, ranks: int, pair_bytes: int, shared_bytes: int) -> None:
        self._rank, self._ranks = rank, ranks
        self._pair, self._part = pair_bytes, ranks * pair_bytes + shared_bytes
        self._file: int | None = None
        self._host_address = 0

    def offer(self) -> bytes:
        """Where this rank's GPU is, behind the first rank's file, which is in no folder and so leaves nothing behind,
        whoever dies."""
        gpu = _gpu_address()
        if self._rank:
            return gpu.encode()
        name = f"shardwise-{secrets.token_hex(8)}"
        self._file = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self._file, self._ranks * self._part)
        return f"/proc/{os.getpid()}/fd/{self._file} {name} {gpu}".encode()

    def open(self, offers: Sequence[bytes]) -> Wires:
        size = self._ranks * self._part
        path, name, *first_gpu = offers[0].decode().split()
        if self._file is None:
            if name not in os.readlink(path):  # another container's process may have that number here
                raise OSError(f"{path} is not the first rank's memory, so it runs in another container")
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._memory = mmap.mmap(self._file, size)
        self._place(["".join(first_gpu), *(offer.decode() for offer in offers[1:])])
        first, pairs = self._rank * self._part, self._ranks * self._pair
        filled = bytes([NOTHING_BYTE]) * pairs + bytes(self._part - pairs)
        self._memory[first : first + self._part] = filled
        host_address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        base = cuda.register_host(host_address, size)
        self._host_address = host_address

        def at(writer: int, reader: int) -> int:
            return base + writer * self._part + reader * self._pair

        ranks = range(self._ranks)
        return Wires(
            tuple(at(self._rank, reader) for reader in ranks if reader != self._rank),
            tuple(at(writer, self._rank) for writer in ranks),
            tuple(at(writer, self._ranks) for writer in ranks),
        )

    def _place(self, gpus: Sequence[str]) -> None:
        """Each part on the NUMA node of its writer's GPU: who touches a page first, from there, has the kernel put it
        there. So every rank does it for all: registering them, whichever rank is first, touches what is left."""
        for writer, gpu in enumerate(gpus):
            with on_cores(local_cores(gpu)):
                _touch(self._memory, writer * self._part, self._part)

    def close(self) -> None:
        if self._host_address:
            cuda.unregister_host(self._host_address)
            self._host_address = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """This thread on those of them that it may use; where it may use none, as it is."""
    allowed = os.sched_getaffinity(0)
    if not cores & allowed:
        yield
        return
    os.sched_setaffinity(0, cores & allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _touch(memory: mmap.mmap, start: int, n_bytes: int) -> int:
    """Reads a byte of each page; → how many."""
    return len(memory[start : start + n_bytes : mmap.PAGESIZE])


def _gpu_address() -> str:
    """Empty where the driver does not tell: memory then lies anywhere, and serves as well."""
    try:
        return cuda.pci_address()
    except (OSError, RuntimeError):
        return ""
