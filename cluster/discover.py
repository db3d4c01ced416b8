"""This machine as a Topology: its GPUs by NVML, or shares of its CPU where there is none.

Rates are priors of the catalogue until cluster/measure.py has timed them. Nothing here reads the environment:
what it says (CUDA_VISIBLE_DEVICES, NCCL_P2P_DISABLE) is handed in.
"""

from __future__ import annotations

import importlib
import itertools
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import catalog, rocm
from cluster.catalog import Sheet
from cluster.errors import PlacementFailed
from cluster.nvml import Binding, Gpu, GpuReport, Vitals, read_gpus, read_vitals
from cluster.topology import Device, Link, LinkKind, Topology

MOST_CPU_RANKS = 8
"""CPU ranks offered unasked. More would only thin out each other's threads."""

LIMIT_CPU_RANKS = 64
"""CPU ranks that one host is ever split into. A process each, with a link to every other: thousands are a slip of
the keyboard that would take minutes to plan."""

SHEET_CPU_CORES = 8
"""Cores of the catalogue's CPU (its source: eight AVX2 cores)."""

NVLINK_LANE_BYTES_PER_S = 25e9
"""One NVLink lane in one direction, generations 2 to 4 (sheets of V100, A100, H100: half of 900/18)."""

TENSOR_OVER_FLOAT32 = 2.0
"""Dense bfloat16 rate of a card that the catalogue lacks, over its float32 rate: the least of all tensor-core
cards (GeForce, float32 accumulation: 71/35.6, 165.2/82.6, 209.5/104.8 TFLOP/s)."""


def discover(
    world_size: int | None = None,
    device: str | None = None,
    *,
    peer_access: bool = True,
    visible: str | None = None,
    binding: Binding = None,
) -> Topology:
    """What is here: `world_size` GPUs, or ranks of the CPU. Unasked: all GPUs; a rank a core up to a limit.

    `device` is "cuda", "cpu" or None: GPUs if there are any. `peer_access=False` stages all traffic between
    GPUs through host memory, as NCCL_P2P_DISABLE=1 does. `visible` is CUDA_VISIBLE_DEVICES, or None where it
    is unset. Raises PlacementFailed where more is asked for than is here.
    """
    if device == "cpu":
        return cpu_topology(world_size)
    report, visible = report_here(visible, binding)
    gpus = visible_gpus(report.gpus, visible)
    if device is None and not gpus:
        return cpu_topology(world_size)
    if not gpus:
        raise PlacementFailed(f"no GPU: {_why_none(report, visible)}; use --device cpu")
    if world_size is not None and world_size > len(gpus):
        raise PlacementFailed(f"{world_size} GPUs asked for, {len(gpus)} here; ask for {len(gpus)} or fewer")
    return gpu_topology(report, gpus[:world_size], peer_access=peer_access)


def report_here(visible: str | None, binding: Binding = None) -> tuple[GpuReport, str | None]:
    """What the driver says, and which of its GPUs may be used: of AMD's, those that torch sees at all."""
    report = read_gpus(binding)
    if report.gpus or binding is not None or rocm.torch_build()[1] is None:
        return report, visible
    # By name: who imports this module to decide something must stay free of torch where there is no ROCm.
    return rocm.read_gpus(importlib.import_module("torch")), None


def device_vitals(devices: Sequence[Device], binding: Binding = None) -> tuple[Vitals, ...]:
    """Clocks, temperature, watts and throttling of each device now; empty for a CPU."""
    uuids = [device.uuid for device in devices if device.kind == "cuda"]
    return read_vitals(uuids, binding) if uuids else ()


def visible_gpus(gpus: Sequence[Gpu], visible: str | None) -> tuple[Gpu, ...]:
    """Those that CUDA_VISIBLE_DEVICES lets through, in its order: indices or (beginnings of) UUIDs.

    As in CUDA, the first entry that names no GPU ends the list. Indices count by PCI address, as the driver
    tools do and CUDA does under CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    if visible is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for word in visible.split(","):
        name = word.strip()
        found = [g for g in gpus if name == str(g.index) or (len(name) > 4 and g.uuid.startswith(name))]
        if len(found) != 1:
            break
        chosen.append(found[0])
    return tuple(chosen)


def _why_none(report: GpuReport, visible: str | None) -> str:
    if report.problem:
        return f"NVML says {report.problem!r}"
    if report.gpus:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all {len(report.gpus)}"
    return "the driver lists none"


# --- GPUs ---------------------------------------------------------------------------------------------------


def gpu_topology(report: GpuReport, gpus: Sequence[Gpu], *, peer_access: bool = True) -> Topology:
    """The given GPUs of one node, with priors of the catalogue."""
    node = platform.node()
    sheets = [_sheet_in_slot(gpu) for gpu in gpus]
    devices = tuple(
        replace(
            sheet.device(index, node, free_bytes=gpu.free_bytes),
            name=gpu.name,
            memory_bytes=gpu.memory_bytes,
            uuid=gpu.uuid,
            pci=gpu.pci,
            numa=numa_node(gpu.pci),
        )
        for index, (gpu, sheet) in enumerate(zip(gpus, sheets, strict=True))
    )
    links = {
        (i, j): _link(report, (gpus[i], gpus[j]), (sheets[i], sheets[j]), peer_access)
        for i, j in itertools.combinations(range(len(gpus)), 2)
    }
    host = host_memory_bytes()
    return Topology(_machine_name(gpus), devices, links, report.driver, {node: host})


def host_memory_bytes() -> int:
    """That could be locked. A control group counts pages of files that were read as used: its limit alone says
    something."""
    available = _meminfo(Path("/proc/meminfo"))[1]
    return min(available, read_cpu().memory_bytes)


def link_kind(report: GpuReport, a: Gpu, b: Gpu, sheets: tuple[Sheet, Sheet]) -> LinkKind:
    """As the driver says; by the data sheets where it does not."""
    pair = (min(a.index, b.index), max(a.index, b.index))
    if pair in report.nvlink:
        return LinkKind.NVLINK
    by_sheet = all(sheet.peer_access for sheet in sheets)
    return LinkKind.PCIE if report.peer_access.get(pair, by_sheet) else LinkKind.HOST


def numa_node(pci: str, root: Path = Path("/sys/bus/pci/devices")) -> int:
    """The NUMA node that a PCI device hangs on; 0 where the kernel does not say (-1: a machine with one)."""
    try:
        return max(0, int((root / pci / "numa_node").read_text()))
    except (OSError, ValueError):
        return 0


def _link(report: GpuReport, gpus: tuple[Gpu, Gpu], sheets: tuple[Sheet, Sheet], peer_access: bool) -> Link:
    kind = link_kind(report, *gpus, sheets) if peer_access else LinkKind.HOST
    if kind is LinkKind.NVLINK:
        a, b = (
            replace(sheet, nvlink_bytes_per_s=_nvlink_bytes_per_s(own, other, sheet))
            for own, other, sheet in zip(gpus, gpus[::-1], sheets, strict=True)
        )
        return catalog.prior_link(kind, a, b)
    return catalog.prior_link(kind, *sheets)


def _nvlink_bytes_per_s(own: Gpu, other: Gpu, sheet: Sheet) -> float:
    """One direction from `own` to `other`: all lanes through a switch, else the lanes between the two."""
    lane = own.nvlink_lane_bytes_per_s or NVLINK_LANE_BYTES_PER_S
    whole = sheet.nvlink_bytes_per_s or (own.nvlink_lanes + own.nvlink_lanes_down) * lane
    lanes = own.nvlink_lanes + own.nvlink_lanes_down
    if not lanes:
        return whole or NVLINK_LANE_BYTES_PER_S  # the driver knows of a link but not of its lanes
    usable = own.nvlink_lanes if own.nvlink_switched else own.nvlink_lanes_to.get(other.pci, own.nvlink_lanes)
    return whole * usable / lanes


def _sheet_in_slot(gpu: Gpu) -> Sheet:
    """The card's data sheet, with no more of PCIe than its slot gives.

    An idle card's generation says nothing.
    """
    sheet = catalog.find(gpu.name) or _sheet_of_unknown(gpu)
    return replace(
        sheet,
        pcie_generation=min(sheet.pcie_generation, gpu.pcie_generation_max or sheet.pcie_generation),
        pcie_lanes=min(sheet.pcie_lanes, gpu.pcie_lanes or sheet.pcie_lanes),
    )


def _sheet_of_unknown(gpu: Gpu) -> Sheet:
    """A card that the catalogue lacks, by its clocks, cores and bus; without those, the slowest known."""
    cards = [sheet for sheet in catalog.sheets().values() if sheet.kind == "cuda"]
    float32 = gpu.float32_flops_per_s or min(sheet.flops_per_s["float32"] for sheet in cards)
    tensor = TENSOR_OVER_FLOAT32 * float32
    return Sheet(
        key=gpu.name,
        names=(gpu.name,),
        kind="cuda",
        memory_bytes=gpu.memory_bytes,
        bandwidth_bytes_per_s=gpu.memory_bytes_per_s or min(s.bandwidth_bytes_per_s for s in cards),
        flops_per_s={"float32": float32, "bfloat16": tensor, "float16": tensor},
        nvlink_bytes_per_s=0.0,
        bridge=False,
        pcie_generation=gpu.pcie_generation_max or 3,
        pcie_lanes=gpu.pcie_lanes or 16,
        peer_access=False,
        watts=0.0,
        price_usd=None,
        rent_usd_per_hour=None,
        source="clocks, cores and bus width that the driver tells",
    )


def _machine_name(gpus: Sequence[Gpu]) -> str:
    """`2 × NVIDIA GeForce RTX 4090`, mixed cards joined by a plus."""
    counts: dict[str, int] = {}
    for gpu in gpus:
        counts[gpu.name] = counts.get(gpu.name, 0) + 1
    return " + ".join(f"{n} × {name}" for name, n in counts.items())


# --- CPU ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cpu:
    name: str
    cores: int  # that this process may use
    memory_bytes: int
    free_bytes: int


def read_cpu(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> Cpu:
    """The CPU and memory that this process may use: the machine's, or its control group's where less."""
    total, available = _meminfo(proc / "meminfo")
    limits = list(_cgroup_limits(proc / "self" / "cgroup", cgroup))
    return Cpu(
        name=_cpu_name(proc / "cpuinfo"),
        cores=usable_cores(cgroup),
        memory_bytes=min([total, *(limit for limit, _ in limits)]),
        free_bytes=min([available, *(limit - used for limit, used in limits)]),
    )


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may run on, no more than its control group's quota of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def cpu_topology(world_size: int | None = None, cpu: Cpu | None = None) -> Topology:
    """Ranks that share one host's cores and memory: one pool."""
    if world_size is not None and world_size > LIMIT_CPU_RANKS:
        limit = f"{LIMIT_CPU_RANKS} ranks at most"
        raise PlacementFailed(
            f"{world_size} CPU ranks asked for; one host is split into {limit}: ask for fewer"
        )
    cpu = cpu or read_cpu()
    ranks = world_size or min(cpu.cores, MOST_CPU_RANKS)
    node = platform.node()
    sheet = catalog.sheet("cpu")
    flops = {dtype: rate * cpu.cores / SHEET_CPU_CORES for dtype, rate in sheet.flops_per_s.items()}
    prior = replace(
        sheet.device(0, node, free_bytes=cpu.free_bytes, pool=f"cpu:{node}"),
        name=cpu.name,
        memory_bytes=cpu.memory_bytes,
        flops_per_s={
            "bfloat16": flops["float32"],
            **flops,
        },  # until measured: half may be faster or far slower
    )
    return Topology(
        name=f"{cpu.name}, {cpu.cores} cores",
        devices=tuple(replace(prior, index=rank) for rank in range(ranks)),
        links=catalog.prior_links([(sheet, node)] * ranks),
    )


def _cpu_name(cpuinfo: Path) -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _meminfo(path: Path) -> tuple[int, int]:
    """Bytes in all and available. Without /proc (macOS) all of it counts as available."""
    try:
        rows = dict(re.findall(r"^(\w+):\s+(\d+) kB$", path.read_text(), re.MULTILINE))
        return int(rows["MemTotal"]) * 1024, int(rows["MemAvailable"]) * 1024
    except (OSError, KeyError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total


def _cgroup_limits(membership: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of this process's memory control groups, versions 2 and 1, here and above."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, files = root, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, files = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the group's own directory is often mounted as the root, so the path may not exist
        # there.
        own = base / path.lstrip("/")
        for folder in [own, *own.parents][: len(own.relative_to(base).parts) + 1]:
            try:
                yield tuple(int((folder / name).read_text()) for name in files)  # type: ignore[misc]
            except (OSError, ValueError):  # absent, or the word "max"
                continue
