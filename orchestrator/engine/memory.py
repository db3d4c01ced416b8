"""Memory of a device as it is now."""

from __future__ import annotations

from pathlib import Path

import torch

CPU_SHARE = 0.1
CPU_KV_BYTES = 2**30
"""The KV of one CPU rank: a GiB, or a tenth of what the host has to give, since other ranks want theirs too."""


def free_for_kv(device: torch.device, utilization: float) -> int:
    """Bytes that the KV cache may take. On a GPU, after a full batch has run: what the batch took stays with torch."""
    if device.type != "cuda":
        return min(CPU_KV_BYTES, int(CPU_SHARE * available_host_bytes()))
    free, total = torch.cuda.mem_get_info(device)
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return int(free + max(0, reusable) - (1 - utilization) * total)


def available_host_bytes() -> int:
    """What the kernel says could be taken without swapping (Linux)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable line")
