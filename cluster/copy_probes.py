"""What cluster/measure.py times of copies: between host memory and GPUs, from GPU to GPU, and from the disk."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.link_probes import met
from cluster.nvml import read_pcie
from cluster.probes import Target
from cluster.profile import DiskRead, HostCopy, HostPull, PairCopy

COPY_BYTES = 128 << 20
PIECES = 4  # copies in a row, so that what starts and ends them counts little
TOGETHER_S = 0.25  # that all copy at once
PAIR_BYTES = 128 << 20

DISK_BYTES = 512 << 20
DISK_PIECE = 4 << 20
DISK_THREADS = 4  # one reader leaves an NVMe disk idle half of the time
LEAST_FREE_DISK = 4 << 30

Pcie = tuple[int | None, int | None]  # generation and lanes


def host_copies(target: Target, meeting: str) -> tuple[list[HostCopy], Pcie]:
    """Of this GPU, alone while the others wait for their turn, then with all at once; and its link under load."""
    with met(target, meeting) as device, torch.cuda.device(device):
        memory = _Memory(device)
        found: list[HostCopy] = []
        pcie: Pcie = (None, None)
        for turn in range(target.ranks):
            _all_here()
            if turn == target.rank:
                pcie = memory.pcie_under_load(target.uuid)
                found += [_alone(target, memory, *case) for case in _CASES]
        for pinned in (True, False):
            _all_here()
            found += _together(target, memory, pinned)
        _all_here()
        return found, pcie


def host_pulls(target: Target, meeting: str) -> HostPull:
    """Of this GPU, alone while the others wait for their turn, then with all at once."""
    with met(target, meeting) as device, torch.cuda.device(device):
        n_bytes = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
        host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).fill_(1)
        on_device = torch.empty(n_bytes, dtype=torch.uint8, device=device)

        def pulled() -> float:
            """Bytes a second: copies wait in a row, as layers do."""
            until, pieces = time.perf_counter() + TOGETHER_S, 0
            start = time.perf_counter()
            while time.perf_counter() < until:
                for _ in range(PIECES):
                    on_device.copy_(host, non_blocking=True)
                torch.cuda.synchronize(device)
                pieces += PIECES
            return pieces * n_bytes / (time.perf_counter() - start)

        alone = 0.0
        for turn in range(target.ranks):
            _all_here()
            if turn == target.rank:
                on_device.copy_(host)
                alone = pulled()
        _all_here()
        together = pulled() if target.ranks > 1 else alone
        _all_here()
        return HostPull(target.rank, alone, together)


_CASES = list(itertools.product((True, False), (True, False)))  # to the device, pinned


class _Memory:
    def __init__(self, device: torch.device) -> None:
        n_bytes = min(COPY_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
        self.on_device = [torch.zeros(n_bytes, dtype=torch.uint8, device=device) for _ in range(2)]
        # Written to: pages that are not all read as one page of zeros.
        self.pinned = [torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True).fill_(1) for _ in range(2)]
        self.pageable = [torch.empty(n_bytes, dtype=torch.uint8).fill_(1) for _ in range(2)]
        self.streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(self, to_device: bool, pinned: bool) -> None:
        """On the direction's own stream; from or to pageable memory it returns when it is done."""
        way = int(to_device)
        host, on_device = (self.pinned if pinned else self.pageable)[way], self.on_device[way]
        with torch.cuda.stream(self.streams[way]):
            (on_device if to_device else host).copy_(host if to_device else on_device, non_blocking=True)

    def finish(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    def pcie_under_load(self, uuid: str) -> Pcie:
        """An idle card lowers its link's generation, so it is asked while it copies."""
        self.copy(True, True)
        self.finish()
        for _ in range(4 * PIECES):
            self.copy(True, True)
        found = read_pcie(uuid)
        self.finish()
        return found


def _alone(target: Target, memory: _Memory, to_device: bool, pinned: bool) -> HostCopy:
    def pieces() -> None:
        for _ in range(PIECES):
            memory.copy(to_device, pinned)
        memory.finish()

    pieces()
    seconds = min(_clock(pieces) for _ in range(3))
    rate = PIECES * memory.pageable[0].nbytes / seconds
    return HostCopy(target.rank, to_device, pinned, together=False, bytes_per_s=rate)


def _together(target: Target, memory: _Memory, pinned: bool) -> list[HostCopy]:
    """Both directions for a while, each from a thread of its own, since pageable copies block."""
    done = {True: 0, False: 0}
    until = time.monotonic() + TOGETHER_S

    def keep_copying(to_device: bool) -> None:
        with torch.cuda.device(memory.on_device[0].device):
            while time.monotonic() < until:
                memory.copy(to_device, pinned)
                memory.streams[int(to_device)].synchronize()
                done[to_device] += memory.pageable[0].nbytes

    start = time.monotonic()
    threads = [threading.Thread(target=keep_copying, args=(way,)) for way in done]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    return [
        HostCopy(target.rank, way, pinned, together=True, bytes_per_s=n / seconds) for way, n in done.items()
    ]


def _all_here() -> None:
    dist.all_reduce(torch.zeros(1))  # by gloo


def _clock(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def pair_copies(targets: list[Target]) -> list[PairCopy]:
    """From each GPU to each other, one after the other, all from this process."""
    devices = [target.open() for target in targets]
    found = []
    for source, target in itertools.permutations(range(len(devices)), 2):
        room = min(torch.cuda.mem_get_info(devices[i])[0] for i in (source, target)) // 4
        one = torch.zeros(min(PAIR_BYTES, room), dtype=torch.uint8, device=devices[source])
        other = torch.empty_like(one, device=devices[target])

        def pieces(one: torch.Tensor = one, other: torch.Tensor = other) -> None:
            for _ in range(PIECES):
                other.copy_(one, non_blocking=True)
            torch.cuda.synchronize(one.device)
            torch.cuda.synchronize(other.device)

        pieces()
        rate = PIECES * one.nbytes / min(_clock(pieces) for _ in range(3))
        found.append(PairCopy(targets[source].rank, targets[target].rank, rate))
    return found


def disk_read(folder: str) -> DiskRead | None:
    """Of a file written for it and gone afterwards, past the page cache where the file system allows that.

    None where the disk has no room.
    """
    os.makedirs(folder, exist_ok=True)
    room = os.statvfs(folder)
    if room.f_bavail * room.f_frsize < LEAST_FREE_DISK:
        return None
    with tempfile.NamedTemporaryFile(dir=folder, prefix="shardwise-") as file:
        piece = os.urandom(DISK_PIECE)  # a disk may compress
        for _ in range(DISK_BYTES // DISK_PIECE):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
            direct = True
        except OSError:  # tmpfs, some overlays
            descriptor = os.open(file.name, os.O_RDONLY)
            direct = False
        try:
            return DiskRead(str(Path(folder)), _read_bytes_per_s(descriptor), direct)
        finally:
            os.close(descriptor)
            with suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes_per_s(descriptor: int) -> float:
    def read(worker: int) -> int:
        buffer = mmap.mmap(-1, DISK_PIECE)  # aligned to a page, as direct reads must be
        offsets = range(worker * DISK_PIECE, DISK_BYTES, DISK_THREADS * DISK_PIECE)
        return sum(os.preadv(descriptor, [buffer], offset) for offset in offsets)

    with ThreadPoolExecutor(DISK_THREADS) as pool:
        start = time.perf_counter()
        n_bytes = sum(pool.map(read, range(DISK_THREADS)))
        return n_bytes / (time.perf_counter() - start)
