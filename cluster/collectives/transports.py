"""Where the packets of a one-shot all-reduce go: the other GPUs' memory, or memory of the host that all GPUs map."""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.collectives import cuda


@dataclass(frozen=True, slots=True)
class Wires:
    """Device addresses: where this rank's packets go, and where each rank's come (the own entry is unused)."""

    to: tuple[int, ...]
    by_rank: tuple[int, ...]


class Transport(Protocol):
    """Made by every rank; what `offer` returns on each goes to `open` on all. Either may raise."""

    name: str

    def __init__(self, rank: int, ranks: int, region: int) -> None: ...
    def offer(self) -> bytes: ...
    def open(self, offers: Sequence[bytes]) -> Wires: ...
    def close(self) -> None: ...


class PeerMemory:
    """Each rank polls its own device's memory, into which the others push over peer access (NVLink, PCIe)."""

    name = "peer memory"

    def __init__(self, rank: int, ranks: int, region: int) -> None:
        self._rank, self._ranks, self._region = rank, ranks, region
        self._own = 0
        self._peers: dict[int, int] = {}

    def offer(self) -> bytes:
        self._own = cuda.allocate_zeroed(self._ranks * self._region)
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
        )

    def close(self) -> None:
        """The own memory stays until the process ends: to free it before every peer has closed it is undefined."""
        for base in self._peers.values():
            cuda.close_exported(base)
        self._peers.clear()


class MappedHostMemory:
    """Each rank pushes into its own part of one file in memory, which all map, and polls the others' parts."""

    name = "mapped host memory"

    def __init__(self, rank: int, ranks: int, region: int) -> None:
        self._rank, self._ranks, self._region = rank, ranks, region
        self._file: int | None = None
        self._host_address = 0

    def offer(self) -> bytes:
        """The first rank's file, which is in no folder and so leaves nothing behind, whoever dies."""
        if self._rank:
            return b""
        name = f"shardwise-{secrets.token_hex(8)}"
        self._file = os.memfd_create(name, os.MFD_CLOEXEC)
        os.ftruncate(self._file, self._ranks * self._region)
        return f"/proc/{os.getpid()}/fd/{self._file} {name}".encode()

    def open(self, offers: Sequence[bytes]) -> Wires:
        size = self._ranks * self._region
        if self._file is None:
            path, name = offers[0].decode().split()
            if name not in os.readlink(path):  # another container's process may have that number here
                raise OSError(f"{path} is not the first rank's memory, so it runs in another container")
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._memory = mmap.mmap(self._file, size)
        first = self._rank * self._region
        self._memory[first : first + self._region] = bytes(
            self._region
        )  # the toucher's NUMA node has the pages
        host_address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        base = cuda.register_host(host_address, size)
        self._host_address = host_address
        by_rank = tuple(base + rank * self._region for rank in range(self._ranks))
        return Wires((by_rank[self._rank],), by_rank)

    def close(self) -> None:
        if self._host_address:
            cuda.unregister_host(self._host_address)
            self._host_address = 0
        if self._file is not None:
            os.close(self._file)
            self._file = None
