"""Memory of a device as it is now, and what it can do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cluster.errors import BadLayout
from strategies.cost_memory import CAP_SLACK, CONTEXT_BYTES, GAP_BYTES
from strategies.formats import KV_FLOAT8, Format

CPU_SHARE = 0.1
CPU_KV_BYTES = 2**30
"""The KV of one CPU rank: a GiB, or a tenth of what the host has to give, since other ranks want theirs too."""


class Cap:
    """A part of a GPU's memory for this process: CUDA's context, NCCL and torch's together."""

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        """Before anything but the context is on the device."""
        self._device, self._most = device, most_bytes
        # Else gaps between what is kept grow: 1 GB of 25.3 where layers are streamed, and an allocation of 108 MB
        # failed (Qwen2.5-32B at tp2, 2026-11-22).
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
        self._at_first, self._total = torch.cuda.mem_get_info(device)

    @property
    def slack(self) -> int:
        """Of it, that no estimate gives away."""
        return int(CAP_SLACK * self._most)

    def free(self, free_now: int) -> int:
        """What is left of it, where the device has so much free."""
        return capped_free(self._most, self._at_first, free_now)

    def hold(self) -> None:
        """Lets torch take no more than is left of it now."""
        free_now, _ = torch.cuda.mem_get_info(self._device)
        own = torch.cuda.memory_reserved(self._device) + max(0, self.free(free_now))
        torch.cuda.set_per_process_memory_fraction(min(1.0, own / self._total), self._device)


def capped_free(most: int, free_at_first: int, free_now: int) -> int:
    """Of a cap, where what is gone since the process came is its own."""
    return min(free_now, most - CONTEXT_BYTES - (free_at_first - free_now))


def free_for_kv(device: torch.device, utilization: float, cap: Cap | None = None) -> int:
    """Bytes that are to be had beside what is allocated now; on a GPU, within `utilization` of all its memory, or
    within the whole cap."""
    if device.type != "cuda":
        return min(CPU_KV_BYTES, int(CPU_SHARE * available_host_bytes()))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if cap is not None:
        return cap.free(free) + reusable - cap.slack
    return int(free + reusable - (1 - utilization) * total)


def free_for_weights(device: torch.device, utilization: float, cap: Cap | None = None) -> int:
    """The same, without what torch will leave between them."""
    gaps = GAP_BYTES if device.type == "cuda" and cap is None else 0
    return max(0, free_for_kv(device, utilization, cap) - gaps)


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
