"""Host memory that a GPU's copy engine reads and writes by itself: pages of their own, in large ones, locked."""

from __future__ import annotations

import mmap
import time
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

PROBE_BYTES = 64_000_000
PROBES = 3


def paged(n_bytes: int) -> Tensor:
    """uint8 [n_bytes], from the start of a page on, and on no page with anything else."""
    memory = mmap.mmap(-1, n_bytes)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)  # which keeps the mapping


def pin(host: Tensor) -> None:
    """Locks what `paged` gave. torch's own pinned memory comes in powers of two: up to twice as much as is wanted."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = host.data_ptr()
    status = runtime.cudaHostRegister(address, host.nbytes, 0)
    if status != runtime.cudaError.success:
        raise MemoryError(
            f"cudaHostRegister of {host.nbytes / 1e9:.2f} GB failed with CUDA error {int(status)}; "
            "see `ulimit -l`, and how much memory is free"
        )
    weakref.finalize(host, runtime.cudaHostUnregister, address).atexit = False


def rate_to(device: torch.device) -> float:
    """Bytes a second of copies from such memory to a device, the fastest of a few."""
    host = paged(PROBE_BYTES).fill_(1)
    there = torch.empty_like(host, device=device)
    if device.type == "cuda":
        pin(host)
    took_s = []
    for _ in range(1 + PROBES):
        begun_s = time.perf_counter()
        there.copy_(host, non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took_s.append(time.perf_counter() - begun_s)
    return PROBE_BYTES / min(took_s)
