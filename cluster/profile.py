"""What a machine was measured to do: the profile as data, kept on disk, put in place of the catalogue's priors. Pure.

cluster/measure.py makes it. A profile is found again by its GPUs' uuids and by which links they may use, and is
refused where the driver, NCCL, torch or the devices are no longer those that were measured.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as File

import msgspec

from cluster.files import read_back, write_whole
from cluster.paths import Curve, Fit, Op, Path, envelope, fit, moved_share
from cluster.topology import Device, Link, Provenance, Topology

FORMAT = 2
"""Of the file; one of another format is measured again."""

CPU_PRODUCTS = "oneDNN's, weights packed"  # that probes time (onednn.py): of others a profile says nothing

NOISY = 0.5
"""Scatter above which a profile is called rough: quiet machines showed 0.06 to 0.16, busy ones 0.9 to 1.3."""

ALIKE = 0.8
"""Of one pair's copies to another's: within this they are links of one kind."""

LINE_BYTES = 2 << 20
"""Up to here a gloo message's time is a line of its size; beyond, caches end."""

_HALF = ("bfloat16", "float16")

NCCL_WHEELS = ("nvidia-nccl-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu11")  # newest first


@dataclass(frozen=True, slots=True)
class Rates:
    """What one device does, or one pool of CPU cores."""

    bandwidth_bytes_per_s: Mapping[str, float]  # dtype -> weights read by a product with one row
    flops_per_s: Mapping[str, float]  # dtype -> a product with many rows, as in prefill
    layer_overhead_s: float  # a layer whose sizes are next to nothing
    products: Mapping[str, Mapping[int, float]] = field(
        default_factory=dict
    )  # of a CPU: dtype -> rows -> FLOP/s with weights beyond the caches


@dataclass(frozen=True, slots=True)
class Detail:
    """The same more closely, of one GPU or of the CPU's pool."""

    read_bytes_per_s: float  # a sum over memory beyond the caches
    copy_bytes_per_s: float  # bytes read plus bytes written
    products: Mapping[
        str, Mapping[int, float]
    ]  # dtype -> rows -> FLOP/s with a weight of `product_size` squared
    product_size: int
    launch_s: float  # host time to launch a kernel that does nothing
    graph_kernel_s: float | None = None  # such a kernel's share of a CUDA graph; None on a CPU
    pcie_generation: int | None = None  # while copies ran
    pcie_lanes: int | None = None


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Between host memory and a GPU."""

    device: int
    to_device: bool
    pinned: bool
    together: bool  # both directions on all GPUs at once; else alone on the machine
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class HostPull:
    """What a GPU pulls from pinned host memory, nothing going the other way: how offloaded weights come."""

    device: int
    alone_bytes_per_s: float
    together_bytes_per_s: float  # while all GPUs pull


@dataclass(frozen=True, slots=True)
class PairCopy:
    """From one GPU's memory to another's by a copy engine, over whatever path the driver takes."""

    source: int
    target: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class DiskRead:
    path: str
    bytes_per_s: float
    direct: bool  # past the page cache; else the file system refused that


@dataclass(frozen=True, slots=True)
class MachineProfile:
    format: int
    machine: str  # Topology.name
    fingerprint: str  # of devices, their links' kinds, driver, NCCL and torch
    measured_at: str  # ISO 8601, UTC
    torch_version: str
    driver: str  # empty without one
    nccl_version: str  # empty without it
    devices: tuple[Device, ...]  # as found, with priors
    links: tuple[tuple[int, int, Link], ...]
    rates: tuple[Rates, ...]  # one a GPU; of a CPU one for the whole pool, by one process with all cores
    pool_at_once: Mapping[int, Rates] = field(default_factory=dict)  # CPU: ranks at work -> all together
    curves: tuple[Curve, ...] = ()
    absent: Mapping[str, str] = field(default_factory=dict)  # path -> why it was not measured
    details: tuple[Detail, ...] = ()  # as `rates`; empty in a quick profile
    host_copies: tuple[HostCopy, ...] = ()
    pair_copies: tuple[PairCopy, ...] = ()
    disk: DiskRead | None = None
    seconds: float = 0.0  # that measuring took
    host_pulls: tuple[HostPull, ...] = ()  # in quick profiles too; empty in those of an earlier day
    host_bytes: Mapping[str, int] = field(default_factory=dict)  # host memory that was to be had, by node

    @property
    def full(self) -> bool:
        return bool(self.details)

    @property
    def all_reduce(self) -> dict[int, Fit]:
        """By ranks: a line through the best path's time at each size, in a CUDA graph where there are such."""
        counts = {curve.ranks for curve in self.curves if curve.op is Op.ALL_REDUCE}
        return {ranks: found for ranks in sorted(counts) if (found := self._best(Op.ALL_REDUCE, ranks))}

    @property
    def send_recv(self) -> Fit | None:
        """Between the first two devices; None where there is one."""
        return self._best(Op.SEND_RECV, 2)

    @property
    def scatter(self) -> float:
        """The largest distance of a gloo message from a line, as a share of its time: noise, as one line should do."""
        lines = [
            fit([point for point in curve.points if point[0] <= LINE_BYTES])
            for curve in self.curves
            if curve.path is Path.GLOO
        ]
        return max((line.residual for line in lines), default=0.0)

    @property
    def topology(self) -> Topology:
        links = {(a, b): link for a, b, link in self.links}
        return Topology(self.machine, self.devices, links, self.driver, self.host_bytes)

    def _best(self, op: Op, ranks: int) -> Fit | None:
        for in_graph in (True, False):
            points = envelope(self.curves, op, ranks, in_graph)
            if points:
                share = moved_share(op, ranks)
                return fit([(int(share * size), seconds) for size, seconds in points])
        return None


# --- kept on disk -------------------------------------------------------------------------------------------


def key_of(topology: Topology) -> str:
    """Of the file's name: the devices, in their order, and the kinds of links that they may use."""
    return _digest([topology.name, *(d.uuid for d in topology.devices), *_kinds(topology)])


def fingerprint_of(topology: Topology) -> str:
    """Changes with the devices, their order and links, the cores that we may use, driver, NCCL and torch."""
    devices = [f"{device.name} {device.uuid} {device.memory_bytes}" for device in topology.devices]
    software = [version("torch"), topology.driver, nccl_version()]
    if topology.devices[0].kind == "cpu":
        software.append(CPU_PRODUCTS)
    return _digest([topology.name, *devices, *_kinds(topology), *software])


@functools.cache
def nccl_version() -> str:
    """Of NVIDIA's wheel, which torch's needs; empty where there is none."""
    for name in NCCL_WHEELS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def profile_path(cache_dir: File, topology: Topology) -> File:
    return cache_dir / f"profile-{key_of(topology)}.json"


def kept(cache_dir: File, topology: Topology) -> MachineProfile | None:
    """The profile of this very machine, as it is now; None if there is none."""
    found = read(profile_path(cache_dir, topology))
    return None if found is None or changes(found, topology) else found


def read(path: File) -> MachineProfile | None:
    """None if there is no file, or it is of another format or damaged."""
    found = read_back(path, MachineProfile)
    return found if found is not None and found.format == FORMAT else None


def changes(profile: MachineProfile, topology: Topology) -> list[str]:
    """What is no longer as it was when the profile was taken, in words; empty: it holds."""
    if profile.fingerprint == fingerprint_of(topology):
        return []
    software = {
        "torch": (profile.torch_version, version("torch")),
        "driver": (profile.driver, topology.driver),
        "NCCL": (profile.nccl_version, nccl_version()),
        "machine": (profile.machine, topology.name),
    }
    words = [
        f"{name} was {then or 'absent'}, is {now or 'absent'}"
        for name, (then, now) in software.items()
        if then != now
    ]
    return words or ["its devices or links are others now, or its products are made in another way"]


def save(profile: MachineProfile, path: File) -> None:
    write_whole(encoded(profile), path)


def encoded(profile: MachineProfile) -> bytes:
    return msgspec.json.format(msgspec.json.encode(profile))


def _digest(facts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]


def _kinds(topology: Topology) -> list[str]:
    return [f"{a}-{b} {link.kind}" for (a, b), link in sorted(topology.links.items())]


# --- in place of priors -------------------------------------------------------------------------------------


def apply(profile: MachineProfile, topology: Topology, dtype: str) -> Topology:
    """The topology with what was measured in place of priors.

    `dtype` is the weights': it sets how fast they are read.
    """
    devices = tuple(_measured_device(profile, device, dtype) for device in topology.devices)
    if profile.send_recv is None or not profile.all_reduce:
        return replace(topology, devices=devices)
    tried = topology.link(0, 1).kind
    links = {
        pair: _measured_link(profile, link, _beside_the_first(profile, pair)) if link.kind is tried else link
        for pair, link in topology.links.items()
    }
    return replace(topology, devices=devices, links=links)


def _measured_device(profile: MachineProfile, device: Device, dtype: str) -> Device:
    index = 0 if device.pool else device.index
    rates = _pool_rates(profile) if device.pool else profile.rates[index]
    bandwidth = rates.bandwidth_bytes_per_s
    detail = profile.details[index] if profile.details else None
    alone, together = _pulls(profile, device)
    return replace(
        device,
        bandwidth_bytes_per_s=max(
            bandwidth.get(dtype, max(bandwidth.values())),
            # A library's product with one row reads an H100 at 2.4 TB/s of 3.0; the engine has its own.
            detail.read_bytes_per_s if detail and device.kind == "cuda" else 0.0,
        ),
        flops_per_s={**_as_probed(device, rates), **rates.flops_per_s},
        layer_overhead_s=rates.layer_overhead_s,
        products=rates.products or (detail.products if detail else {}),
        host_bytes_per_s=alone,
        host_together_bytes_per_s=together,
        provenance=Provenance.MEASURED,
    )


def _as_probed(device: Device, rates: Rates) -> dict[str, float]:
    """The data sheet's rates, less by what a probe missed of half precision's: those in fewer bits were not timed."""
    half = [
        rates.flops_per_s[d] / device.flops_per_s[d]
        for d in _HALF
        if d in rates.flops_per_s and d in device.flops_per_s
    ]
    share = min(1.0, max(half)) if half else 1.0
    return {dtype: share * rate for dtype, rate in device.flops_per_s.items()}


def _pulls(profile: MachineProfile, device: Device) -> tuple[float | None, float | None]:
    """From pinned host memory to a GPU: alone, and while all GPUs pull.

    A profile that did not time pulls alone has both directions at once: what they carry together one may carry, as far
    as a card alone does (an H100 54 GB/s alone, 28 in and 42 out at once).
    """
    for pull in profile.host_pulls:
        if pull.device == device.index:
            return pull.alone_bytes_per_s, pull.together_bytes_per_s
    own = [c for c in profile.host_copies if c.device == device.index and c.pinned]
    alone = next((c.bytes_per_s for c in own if c.to_device and not c.together), None)
    both = sum(c.bytes_per_s for c in own if c.together)
    if alone is None or not both:
        return device.host_bytes_per_s, device.host_together_bytes_per_s
    return alone, min(alone, both)


def _pool_rates(profile: MachineProfile) -> Rates:
    """The best that a pool did, by one process or by several at once: what its ranks share.

    Other programs only ever slow it down, so of two figures for the same cores the better is truer.
    """
    seen = [profile.rates[0], *profile.pool_at_once.values()]
    return Rates(
        {dtype: max(r.bandwidth_bytes_per_s[dtype] for r in seen) for dtype in seen[0].bandwidth_bytes_per_s},
        {dtype: max(r.flops_per_s[dtype] for r in seen) for dtype in seen[0].flops_per_s},
        min(r.layer_overhead_s for r in seen),
        {
            dtype: {rows: max(r.products[dtype][rows] for r in seen) for rows in by_rows}
            for dtype, by_rows in seen[0].products.items()
        },
    )


def _beside_the_first(profile: MachineProfile, pair: tuple[int, int]) -> float:
    """A pair's copies over those of the first two devices, whose collectives were timed; 1 at most or unknown."""
    rates = {
        (a, b): min(
            (c.bytes_per_s for c in profile.pair_copies if {c.source, c.target} == {a, b}), default=None
        )
        for a, b in ((0, 1), pair)
    }
    first, own = rates[0, 1], rates[pair]
    return 1.0 if first is None or own is None else min(1.0, own / first)


def _measured_link(profile: MachineProfile, link: Link, share: float) -> Link:
    """A group of any size is priced at the least all-reduce bandwidth that a measured one had.

    The curves themselves go with it, for whoever prices by message and path; but not where the pair is slower than
    the one that they were taken of, whose bandwidth it has only a `share` of.
    """
    assert profile.send_recv is not None
    return replace(
        link,
        latency_s=profile.send_recv.latency_s,
        bytes_per_s=share * min(found.bytes_per_s for found in profile.all_reduce.values()),
        all_reduce_latency_s={ranks: found.latency_s for ranks, found in profile.all_reduce.items()},
        curves=profile.curves if share > ALIKE else (),
        provenance=Provenance.MEASURED,
    )
