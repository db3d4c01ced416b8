"""Memory of a device as it is now, and what it can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cluster.errors import BadLayout
from strategies.formats import KV_FLOAT8, Format

CPU_SHARE = 0.1
CPU_KV_BYTES = 2**30
"""The KV of one CPU rank: a GiB, or a tenth of what the host has to give, since other ranks want theirs too."""


def free_for_kv(device: torch.device, utilization: float) -> int:
    """Bytes that are to be had beside what is allocated now; on a GPU, within `utilization` of all its memory."""
    if device.type != "cuda":
        return min(CPU_KV_BYTES, int(CPU_SHARE * available_host_bytes()))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + reusable - (1 - utilization) * total)


@contextmanager
def peak_of(device: torch.device) -> Iterator[list[int]]:
    """Fills the list with the most bytes that torch took of the device, gaps too, beyond those it had before."""
    found: list[int] = []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield found
    torch.cuda.synchronize(device)
    found.append(torch.cuda.max_memory_reserved(device) - before)


def multiplies_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def check_float8(kept: Format, device: torch.device) -> None:
    """Raises BadLayout where a device cannot do what a format wants of it."""
    if kept.weights == "fp8" and not multiplies_float8(device):
        raise BadLayout("+fp8 wants GPUs of compute capability 8.9 on, and this device has less; use +int8")
    if kept.has_float8_kv and device.type == "cuda" and not multiplies_float8(device):
        raise BadLayout(
            f"+{KV_FLOAT8} wants GPUs of compute capability 8.9 on, and this device has less; leave it away"
        )


def available_host_bytes() -> int:
    """What the kernel says could be taken without swapping (Linux)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")
