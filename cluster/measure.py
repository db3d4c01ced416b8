"""What this machine really does: a few seconds of timed probes, kept on disk, put in place of the catalogue's
priors.

The work that is timed is in cluster/probes.py, which imports torch; this module does not until it measures.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from cluster.errors import GangDied
from cluster.topology import Device, Link, Provenance, Topology

if TYPE_CHECKING:
    from cluster.probes import Target

Progress = Callable[[str], None]
Point = tuple[int, float]  # bytes, seconds
T = TypeVar("T")

FORMAT = 1
"""Of the file; one of another format is measured again."""

NOISY = 0.5
"""Scatter above which a profile is called rough: quiet machines showed 0.06 to 0.16, busy ones 0.9 to 1.3."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What one device does, or one pool of CPU cores."""

    bandwidth_bytes_per_s: Mapping[str, float]  # dtype -> weights read by a product with one row
    flops_per_s: Mapping[str, float]  # dtype -> a product with many rows, as in prefill
    layer_overhead_s: float  # a layer whose sizes are next to nothing


@dataclass(frozen=True, slots=True)
class Fit:
    """seconds = latency_s + moved / bytes_per_s, where an all-reduce of n moves 2(n-1)/n of its bytes."""

    latency_s: float
    bytes_per_s: float
    residual: float  # the largest error at a measured size, as a share of its time


@dataclass(frozen=True, slots=True)
class MachineProfile:
    format: int
    machine: str  # Topology.name
    fingerprint: str  # of devices, driver-given ids and torch: another one is another machine
    measured_at: str  # ISO 8601, UTC
    torch_version: str
    rates: tuple[Rates, ...]  # one a GPU; of a CPU one for the whole pool, by one process with all cores
    pool_at_once: Mapping[int, Rates] = field(default_factory=dict)  # CPU: ranks at work -> all together
    all_reduce: Mapping[int, Fit] = field(default_factory=dict)  # by ranks
    send_recv: Fit | None = None  # between the first two devices; None where there is one

    @property
    def scatter(self) -> float:
        """The largest distance of a measured message time from its fit, as a share of it."""
        hops = [self.send_recv] if self.send_recv else []
        return max((fit.residual for fit in (*self.all_reduce.values(), *hops)), default=0.0)


def measure(
    topology: Topology,
    cache_dir: Path | None,
    progress: Progress,
    *,
    refresh: bool = False,
    probe_s: float = 0.2,
) -> MachineProfile:
    """Times every device of `topology`, which must be this machine, and the links between them.

    Takes some ten seconds, or none where `cache_dir` holds a profile of this very machine and `refresh` is
    not set. Each of some 20 probes repeats for about `probe_s`: shorter is rougher. Raises GangDied where a
    probing process dies.
    """
    fingerprint = fingerprint_of(topology)
    path = profile_path(cache_dir, fingerprint) if cache_dir else None
    if path and not refresh and (cached := load(path, fingerprint)):
        progress(f"using the profile of {cached.measured_at[:10]}, {path}")
        return cached
    profile = _measure_now(topology, fingerprint, progress, probe_s)
    if profile.scatter > NOISY:
        progress(
            f"times scatter by {profile.scatter:.0%}: something else runs here, so predictions will be rough"
        )
    if path:
        save(profile, path)
    return profile


def profile_path(cache_dir: Path, fingerprint: str) -> Path:
    return cache_dir / f"profile-{fingerprint}.json"


def fingerprint_of(topology: Topology) -> str:
    """Changes with the devices, their order, the cores that we may use, and torch."""
    devices = [f"{device.name} {device.uuid} {device.memory_bytes}" for device in topology.devices]
    facts = "\n".join([topology.name, version("torch"), *devices])
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def load(path: Path, fingerprint: str) -> MachineProfile | None:
    """A kept profile; None if there is none, or it is of another machine, another format or half-written."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=MachineProfile)
    except (OSError, msgspec.DecodeError):
        return None
    return profile if (profile.format, profile.fingerprint) == (FORMAT, fingerprint) else None


def save(profile: MachineProfile, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(msgspec.json.format(msgspec.json.encode(profile)))
    os.replace(file.name, path)  # whole or not at all, also for a second process


def fit(points: Sequence[Point]) -> Fit:
    """The line through (bytes, seconds) with the least squared relative error, its latency at least 0."""
    weighted = [(1 / seconds**2, size, seconds) for size, seconds in points]
    total = sum(w for w, _, _ in weighted)
    # About the means: without them the sums of sizes that lie close together cancel to nothing.
    mean_size = sum(w * size for w, size, _ in weighted) / total
    mean_s = sum(w * seconds for w, _, seconds in weighted) / total
    spread = sum(w * (size - mean_size) ** 2 for w, size, _ in weighted)
    slope = sum(w * (size - mean_size) * (seconds - mean_s) for w, size, seconds in weighted) / spread
    latency = mean_s - slope * mean_size
    if latency < 0:
        latency = 0.0
        slope = sum(w * size * seconds for w, size, seconds in weighted) / sum(
            w * size**2 for w, size, _ in weighted
        )
    if slope <= 0:  # all latency: the largest message bounds the bandwidth from below
        size, seconds = max(points)
        slope = seconds / size
    residual = max(abs(latency + slope * size - seconds) / seconds for size, seconds in points)
    return Fit(latency, 1 / slope, residual)


def apply(profile: MachineProfile, topology: Topology, dtype: str) -> Topology:
    """The topology with what was measured in place of priors.

    `dtype` is the weights': it sets how fast they are read.
    """
    devices = tuple(_measured_device(profile, device, dtype) for device in topology.devices)
    if profile.send_recv is None:
        return replace(topology, devices=devices)
    tried = topology.link(0, 1).kind
    links = {
        pair: _measured_link(profile, link) if link.kind is tried else link
        for pair, link in topology.links.items()
    }
    return replace(topology, devices=devices, links=links)


def _measured_device(profile: MachineProfile, device: Device, dtype: str) -> Device:
    rates = _pool_rates(profile) if device.pool else profile.rates[device.index]
    return replace(
        device,
        bandwidth_bytes_per_s=rates.bandwidth_bytes_per_s[dtype],
        flops_per_s={**device.flops_per_s, **rates.flops_per_s},
        layer_overhead_s=rates.layer_overhead_s,
        provenance=Provenance.MEASURED,
    )


def _pool_rates(profile: MachineProfile) -> Rates:
    """The best that a pool did, by one process or by several at once: what its ranks share.

    Other programs only ever slow it down, so of two figures for the same cores the better is truer.
    """
    seen = [profile.rates[0], *profile.pool_at_once.values()]
    return Rates(
        {dtype: max(r.bandwidth_bytes_per_s[dtype] for r in seen) for dtype in seen[0].bandwidth_bytes_per_s},
        {dtype: max(r.flops_per_s[dtype] for r in seen) for dtype in seen[0].flops_per_s},
        min(r.layer_overhead_s for r in seen),
    )


def _measured_link(profile: MachineProfile, link: Link) -> Link:
    """A group of any size is priced at the least all-reduce bandwidth that a measured one had."""
    assert profile.send_recv is not None
    return replace(
        link,
        latency_s=profile.send_recv.latency_s,
        bytes_per_s=min(fit.bytes_per_s for fit in profile.all_reduce.values()),
        all_reduce_latency_s={ranks: fit.latency_s for ranks, fit in profile.all_reduce.items()},
        provenance=Provenance.MEASURED,
    )


def group_sizes(world_size: int) -> list[int]:
    """2, 4, 8, … and all."""
    powers = [2**i for i in range(1, world_size.bit_length()) if 2**i < world_size]
    return [*powers, world_size] if world_size > 1 else []


# --- measuring ----------------------------------------------------------------------------------------------


def _measure_now(topology: Topology, fingerprint: str, progress: Progress, probe_s: float) -> MachineProfile:
    # Spawned, not forked: CUDA does not survive a fork, nor do torch's threads.
    context = multiprocessing.get_context("spawn")
    world_size = len(topology.devices)
    progress(f"measuring {topology.name}: starting {world_size} processes")
    with ProcessPoolExecutor(world_size, mp_context=context) as pool:
        bench = _Bench(pool, topology, progress, probe_s)
        rates = bench.alone()
        reduces, at_once = {}, {}
        for ranks in group_sizes(world_size):
            points, together = bench.together(ranks)
            moved = 2 * (ranks - 1) / ranks
            reduces[ranks] = fit([(int(moved * size), seconds) for size, seconds in points])
            if topology.devices[0].pool:
                at_once[ranks] = together
        hop = fit(bench.hop()) if world_size > 1 else None
    return MachineProfile(
        format=FORMAT,
        machine=topology.name,
        fingerprint=fingerprint,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        torch_version=version("torch"),
        rates=rates,
        pool_at_once=at_once,
        all_reduce=reduces,
        send_recv=hop,
    )


class _Bench:
    """The probing processes. The jobs of one group wait for each other, so each gets a process of its own."""

    def __init__(
        self, pool: ProcessPoolExecutor, topology: Topology, progress: Progress, probe_s: float
    ) -> None:
        self._pool, self._topology, self._progress, self._probe_s = pool, topology, progress, probe_s

    def alone(self) -> tuple[Rates, ...]:
        """Each GPU, all at once: they share nothing that is timed. Of a CPU, one process with all cores."""
        from cluster import probes

        self._progress("memory bandwidth and matrix rate")
        ranks = 1 if self._topology.devices[0].pool else len(self._topology.devices)
        return tuple(self._on_each(ranks, probes.rates))

    def together(self, ranks: int) -> tuple[list[Point], Rates]:
        """All-reduces of the first `ranks` devices, and what those do in sum when all work at once."""
        from cluster import probes

        self._progress(f"all-reduce over {ranks}, and all {ranks} at work at once")
        found = self._on_each(ranks, probes.group, self._meeting_place())
        return found[0][0], _sum_rates([rates for _, rates in found])

    def hop(self) -> list[Point]:
        from cluster import probes

        self._progress("send and receive")
        points: list[Point] = self._on_each(2, probes.hop, self._meeting_place())[0]
        return points

    def _on_each(self, ranks: int, job: Callable[..., T], *args: object) -> list[T]:
        jobs = [self._pool.submit(job, self._target(rank, ranks), *args) for rank in range(ranks)]
        try:
            return [done.result() for done in jobs]
        except BrokenProcessPool as error:
            where = self._topology.name
            raise GangDied(f"a process that measured {where} died (out of memory?): {error}") from error

    def _target(self, rank: int, ranks: int) -> Target:
        from cluster.discover import usable_cores
        from cluster.probes import Target

        device = self._topology.devices[rank]
        threads = max(1, usable_cores() // ranks) if device.pool else 1
        return Target(device.kind, device.uuid, rank, ranks, threads, self._probe_s)

    def _meeting_place(self) -> str:
        from cluster.collectives.torch_dist import free_port

        return f"tcp://127.0.0.1:{free_port()}"


def _sum_rates(parts: Sequence[Rates]) -> Rates:
    return Rates(
        {d: sum(p.bandwidth_bytes_per_s[d] for p in parts) for d in parts[0].bandwidth_bytes_per_s},
        {d: sum(p.flops_per_s[d] for p in parts) for d in parts[0].flops_per_s},
        max(p.layer_overhead_s for p in parts),
    )
