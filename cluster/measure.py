"""Times what this machine really does: a quick profile in a few seconds, or a full one in under a minute.

What is timed is in probes.py (one device), link_probes.py (between devices) and copy_probes.py, which import torch;
this module does not. What it makes, and where that is kept, is in profile.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path as File
from typing import TYPE_CHECKING, TypeVar

from cluster.children import ChildFailed, Children, Ranks
from cluster.errors import GangDied
from cluster.files import keep_whole
from cluster.loopback import free_port
from cluster.paths import Curve, Op, Path
from cluster.profile import (
    FORMAT,
    NOISY,
    Detail,
    DiskRead,
    HostCopy,
    HostPull,
    MachineProfile,
    PairCopy,
    Rates,
    encoded,
    fingerprint_of,
    kept,
    nccl_version,
    profile_path,
)
from cluster.proof import Trusted
from cluster.topology import LinkKind, Topology

if TYPE_CHECKING:
    from cluster.probes import Target

Progress = Callable[[str], None]
T = TypeVar("T")

PROBE_LIMIT_S = 240.0  # of what one device does alone: seconds, on a busy CPU minutes
SWEEP_LIMIT_S = 60.0
QUICK_PROBE_S = 0.2
FULL_PROBE_S = 0.05  # of each of some hundred probes

QUICK_SIZES = {
    "cpu": (2 << 10, 32 << 10, 256 << 10, 2 << 20),
    "cuda": (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 16 << 20),
}
"""From one token's hidden state to a prefill chunk's."""
FULL_SIZES = {
    "cpu": tuple(1 << power for power in range(12, 29, 2)),  # 4 KB to 256 MB
    "cuda": tuple(1 << power for power in range(12, 29)),
}
SLOW_S = {"cpu": 0.1, "cuda": 1.0}


def by_driver(topology: Topology) -> Trusted:
    """What the driver says that there is, unproved."""
    if topology.devices[0].kind == "cpu":
        return Trusted((Path.GLOO,))
    peers = any(link.kind in (LinkKind.NVLINK, LinkKind.PCIE) for link in topology.links.values())
    return Trusted((Path.PEER, Path.MAPPED, Path.NCCL) if peers else (Path.MAPPED, Path.NCCL))


def measure(
    topology: Topology,
    cache_dir: File | None,
    progress: Progress,
    *,
    refresh: bool = False,
    full: bool = False,
    trusted: Trusted | None = None,
    probe_s: float | None = None,
) -> MachineProfile:
    """Times every device of `topology`, which must be this machine, and the links between them.

    Takes some ten seconds, or none where `cache_dir` holds a profile of this very machine and `refresh` is not set;
    a kept full profile serves for a quick one. Each probe repeats for about `probe_s`: shorter is rougher. Raises
    GangDied where a probing process dies.
    """
    cached = kept(cache_dir, topology) if cache_dir and not refresh else None
    if cache_dir and cached and (cached.full or not full):
        progress(f"using the profile of {cached.measured_at[:10]}, {profile_path(cache_dir, topology)}")
        return cached
    trusted = trusted or by_driver(topology)
    repeat_s = probe_s or (FULL_PROBE_S if full else QUICK_PROBE_S)
    count = len(topology.devices)
    progress(f"measuring {topology.name}: starting {count} process{'es' * (count > 1)}")
    with closing(Children(count, _environment(trusted), progress)) as children:
        bench = Bench(children, topology, progress, repeat_s)
        profile = _measure(bench, topology, trusted, cache_dir if full else None)
    if profile.scatter > NOISY:
        progress(
            f"times scatter by {profile.scatter:.0%}: something else runs here, so predictions will be rough"
        )
    if cache_dir:
        keep_whole(encoded(profile), profile_path(cache_dir, topology))
    return profile


def _environment(trusted: Trusted) -> dict[str, str]:
    """Multicast is for no path of ours, and a fabric that only half supports it hangs."""
    return {"TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", **trusted.environment}


def _measure(bench: Bench, topology: Topology, trusted: Trusted, folder: File | None) -> MachineProfile:
    """In full where a `folder` is given, whose disk is timed too."""
    start = time.monotonic()
    rates = bench.alone()
    pulls = bench.host_pulls()
    details: list[Detail] = []
    copies: list[HostCopy] = []
    pairs: list[PairCopy] = []
    disk: DiskRead | None = None
    if folder is not None:
        details = bench.details()
        copies, details = bench.host_copies(details)
        pairs = bench.pair_copies()
        disk = bench.disk(folder)
    swept = bench.sweeps(trusted.paths, full=folder is not None)
    return MachineProfile(
        format=FORMAT,
        machine=topology.name,
        fingerprint=fingerprint_of(topology),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        torch_version=version("torch"),
        driver=topology.driver,
        nccl_version=nccl_version(),
        devices=topology.devices,
        links=tuple((a, b, link) for (a, b), link in sorted(topology.links.items())),
        rates=rates,
        pool_at_once=swept.at_once,
        curves=tuple(swept.curves),
        absent={**swept.absent, **bench.absent},
        details=tuple(details),
        host_copies=tuple(copies),
        pair_copies=tuple(pairs),
        disk=disk,
        seconds=round(time.monotonic() - start, 1),
        host_pulls=tuple(pulls),
        host_bytes=topology.host_bytes,
    )


@dataclass(slots=True)
class _AllSwept:
    curves: list[Curve] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    at_once: dict[int, Rates] = field(default_factory=dict)


class Bench:
    """The probes, one after the other, on processes that are handed in."""

    def __init__(self, ranks: Ranks, topology: Topology, progress: Progress, probe_s: float) -> None:
        self._ranks, self._topology, self._progress, self._probe_s = ranks, topology, progress, probe_s
        self._on_cpu = topology.devices[0].kind == "cpu"
        self._alone = 1 if topology.devices[0].pool else len(topology.devices)
        self.absent: dict[str, str] = {}  # what could not be measured, and why

    def alone(self) -> tuple[Rates, ...]:
        """Each GPU, all at once: they share nothing that is timed. Of a CPU, one process with all cores."""
        from cluster import probes

        self._progress("memory bandwidth and matrix rate")
        return tuple(self._needed(probes.rates, self._alone))

    def host_pulls(self) -> list[HostPull]:
        """What offloading goes by, so that a plan of one needs no full profile. Some of a second a GPU."""
        if self._on_cpu:
            return []
        from cluster import copy_probes

        self._progress("pulls from host memory, alone and all at once")
        met = self._met(len(self._topology.devices))
        try:
            return self._ranks.each(copy_probes.host_pulls, met, PROBE_LIMIT_S)
        except ChildFailed as error:
            self.absent["pulls from host memory"] = str(error)
            return []

    def details(self) -> list[Detail]:
        from cluster import probes

        self._progress("memory, products of 1 to 2048 rows in each format, launches")
        return self._needed(probes.detail, self._alone)

    def host_copies(self, details: list[Detail]) -> tuple[list[HostCopy], list[Detail]]:
        """And the details with the link that each GPU had while it copied."""
        if self._on_cpu:
            return [], details
        from cluster import copy_probes

        self._progress("copies between host and GPUs, alone and all at once")
        found = self._needed(copy_probes.host_copies, len(self._topology.devices), meeting_place())
        with_pcie = [
            replace(detail, pcie_generation=generation, pcie_lanes=lanes)
            for detail, (_, (generation, lanes)) in zip(details, found, strict=True)
        ]
        return [copy for copies, _ in found for copy in copies], with_pcie

    def pair_copies(self) -> list[PairCopy]:
        count = len(self._topology.devices)
        if self._on_cpu or count == 1:
            return []
        from cluster import copy_probes

        self._progress("copies from GPU to GPU")
        try:
            [found] = self._ranks.each(copy_probes.pair_copies, [([*self._targets(count)],)], PROBE_LIMIT_S)
            return found
        except ChildFailed as error:
            self.absent["copies from GPU to GPU"] = str(error)
            return []

    def disk(self, folder: File) -> DiskRead | None:
        from cluster import copy_probes

        self._progress(f"reading from the disk of {folder}")
        try:
            [found] = self._ranks.each(copy_probes.disk_read, [(str(folder),)], PROBE_LIMIT_S)
            return found
        except ChildFailed as error:
            self.absent["disk"] = str(error)
            return None

    def sweeps(self, paths: Sequence[Path], *, full: bool) -> _AllSwept:
        """Collectives of 2, 4, 8, … and all devices. A path that fails is told of and left out."""
        swept = _AllSwept()
        wanted = tuple(Op) if full else (Op.ALL_REDUCE, Op.SEND_RECV)
        for ranks in group_sizes(len(self._topology.devices)):
            for path in paths:
                # NCCL's one by one: what hangs in one, inside a graph say, costs no other.
                for ops in [(op,) for op in wanted] if path is Path.NCCL else [wanted]:
                    self._sweep(ranks, path, ops, swept, full=full)
        return swept

    def _sweep(self, ranks: int, path: Path, ops: tuple[Op, ...], swept: _AllSwept, *, full: bool) -> None:
        from cluster.link_probes import Sweep, sweep

        kind = self._topology.devices[0].kind
        asked = Sweep(
            ops=ops,
            sizes=FULL_SIZES[kind] if full else QUICK_SIZES[kind],
            paths=(path,),
            slow_s=SLOW_S[kind],
            rates_together=self._on_cpu,
        )
        jobs = [(target, meeting, asked) for target, meeting in self._met(ranks)]
        try:
            found = self._ranks.each(sweep, jobs, SWEEP_LIMIT_S + (PROBE_LIMIT_S if self._on_cpu else 0))
        except ChildFailed as error:
            if self._on_cpu:  # it is the only path
                raise GangDied(
                    f"measuring {ranks} ranks of {self._topology.name} by {path}: {error}"
                ) from error
            what = f"{', '.join(ops).replace('_', '-')} of {ranks} ranks by {path}"
            swept.absent[what] = str(error)
            self._progress(f"{what} cannot be measured: {error}")
            return
        swept.curves += found[0].curves
        swept.absent |= found[0].absent
        parts = [one.rates for one in found if one.rates is not None]
        if parts:
            swept.at_once[ranks] = _sum_rates(parts)

    def _needed(self, job: Callable[..., T], ranks: int, *args: object) -> list[T]:
        try:
            return self._ranks.each(job, [(t, *args) for t in self._targets(ranks)], PROBE_LIMIT_S)
        except ChildFailed as error:
            where = self._topology.name
            raise GangDied(f"a process that measured {where} failed (out of memory?): {error}") from error

    def _met(self, ranks: int) -> list[tuple[Target, str]]:
        meeting = meeting_place()
        return [(target, meeting) for target in self._targets(ranks)]

    def _targets(self, ranks: int) -> list[Target]:
        return targets(self._topology, ranks, self._probe_s)


def targets(topology: Topology, ranks: int, probe_s: float) -> list[Target]:
    """The first `ranks` devices, as the processes that work on them know them."""
    from cluster.discover import usable_cores
    from cluster.probes import Target

    threads = max(1, usable_cores() // ranks) if topology.devices[0].pool else 1
    return [
        Target(d.kind, d.uuid, i, ranks, threads, probe_s) for i, d in enumerate(topology.devices[:ranks])
    ]


def meeting_place() -> str:
    """An address on this host that nobody listens on."""
    return f"tcp://127.0.0.1:{free_port()}"


def group_sizes(world_size: int) -> list[int]:
    """2, 4, 8, … and all."""
    powers = [2**i for i in range(1, world_size.bit_length()) if 2**i < world_size]
    return [*powers, world_size] if world_size > 1 else []


def _sum_rates(parts: Sequence[Rates]) -> Rates:
    return Rates(
        {d: sum(p.bandwidth_bytes_per_s[d] for p in parts) for d in parts[0].bandwidth_bytes_per_s},
        {d: sum(p.flops_per_s[d] for p in parts) for d in parts[0].flops_per_s},
        max(p.layer_overhead_s for p in parts),
        {
            dtype: {rows: sum(p.products[dtype][rows] for p in parts) for rows in by_rows}
            for dtype, by_rows in parts[0].products.items()
        },
    )
