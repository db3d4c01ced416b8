"""AMD's GPUs, as a ROCm build of torch tells of them: the one question that discovery asks torch."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from typing import Any

from cluster import catalog
from cluster.nvml import Gpu, GpuReport


def torch_build() -> tuple[str | None, str | None]:
    """(CUDA, ROCm) that torch was built for, from its version.py: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None, None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    cuda, hip = (
        re.search(rf"^{name}(?:: [^=]+)? = ['\"]([\w.+-]+)['\"]", text, re.MULTILINE)
        for name in ("cuda", "hip")
    )
    return cuda[1] if cuda else None, hip[1] if hip else None


def read_gpus(torch: Any) -> GpuReport:
    """The GPUs that this process sees; `torch` is the module, which is a ROCm build, or its fake."""
    count = torch.cuda.device_count()
    gpus = tuple(_gpu(torch, index) for index in range(count))
    pairs = itertools.combinations(range(count), 2)
    peers = {(a, b): bool(torch.cuda.can_device_access_peer(a, b)) for a, b in pairs}
    fabric = [bool(sheet and sheet.nvlink_bytes_per_s) for sheet in (catalog.find(gpu.name) for gpu in gpus)]
    return GpuReport(
        gpus=gpus,
        driver=f"ROCm {torch.version.hip}",
        peer_access=peers,
        nvlink=frozenset((a, b) for (a, b), granted in peers.items() if granted and fabric[a] and fabric[b]),
        problem="" if gpus else "torch sees no ROCm device",
    )


def _gpu(torch: Any, index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return Gpu(
        index=index,
        name=properties.name,
        uuid=f"GPU-{properties.uuid}",  # as cluster/probes.py looks for it
        pci=f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0",
        memory_bytes=total,
        free_bytes=free,
    )
