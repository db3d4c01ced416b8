"""Devices and the links between them: a machine as data.

A Topology comes from a recipe (launch/recipes/*.yaml), or from what is here (cluster/discover.py). Every figure in
it says where it came from: `measured`, `table` (somebody's measurement) or `datasheet`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.paths import Curve


class LinkKind(StrEnum):
    NVLINK = "nvlink"
    PCIE = "pcie"  # peer access over PCIe: the cards write each other's memory
    HOST = "host"  # no peer access: every byte is staged through host memory
    LOOPBACK = "loopback"  # CPU ranks on one host, gloo
    NETWORK = "network"  # between nodes


class Provenance(StrEnum):
    MEASURED = "measured"
    TABLE = "table"
    DATASHEET = "datasheet"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or one CPU rank's share of a host.

    Devices with the same non-empty `pool` share what the pool has (the cores and memory of one host): its bandwidth,
    FLOP/s and memory are divided by the ranks at work in it. For a GPU, `pool` is empty.
    """

    index: int  # position in Topology.devices
    node: str
    kind: str  # "cuda" or "cpu"
    name: str
    memory_bytes: int
    free_bytes: int
    bandwidth_bytes_per_s: float  # HBM or DRAM, read
    flops_per_s: Mapping[str, float]  # dtype name -> dense matrix rate, float32 accumulation
    step_overhead_s: float = 0.0  # host time that a step costs however small it is
    layer_overhead_s: float = 0.0  # launches and gaps that a layer costs however small it is
    pool: str = ""
    uuid: str = ""
    pci: str = ""
    numa: int = 0
    free_share: float = 1.0  # of a CPU's time, that other programs leave
    usd_per_hour: float | None = None  # rented, or owned over three years; None where unknown
    products: Mapping[str, Mapping[int, float]] = field(
        default_factory=dict
    )  # dtype -> rows -> FLOP/s, measured
    host_bytes_per_s: float | None = None  # from pinned host memory, while no other GPU pulls
    host_together_bytes_per_s: float | None = None  # the same while all GPUs pull; None: not measured
    provenance: Provenance = Provenance.DATASHEET
    uncapped_bytes: int | None = None  # free, where a process was told to take less; None: it was not


@dataclass(frozen=True, slots=True)
class Link:
    kind: LinkKind
    latency_s: float  # of a small message, and of a small all-reduce of two ranks
    bytes_per_s: float  # one direction
    all_reduce_latency_s: Mapping[int, float] = field(default_factory=dict)  # by ranks; empty: from latency_s
    curves: tuple[Curve, ...] = ()  # of groups over such links, by path, as measured; see cluster/paths.py
    one_shot_s: float | None = (
        None  # of a small all-reduce in one kernel; None: links that have no path for it
    )
    provenance: Provenance = Provenance.DATASHEET


@dataclass(frozen=True, slots=True)
class Topology:
    name: str
    devices: tuple[Device, ...]
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict)  # (low index, high index)
    driver: str = ""  # its version; empty without one, and of a machine that is elsewhere
    host_bytes: Mapping[str, int] = field(
        default_factory=dict
    )  # of host memory, to be had, by node, where known

    def link(self, a: int, b: int) -> Link:
        """The path between two devices, by index, in either order."""
        return self.links[min(a, b), max(a, b)]

    def slowest(self, group: Sequence[int]) -> Link | None:
        """The link that bounds a collective over `group`: least bandwidth; None for a group of one."""
        pairs = [self.link(a, b) for i, a in enumerate(group) for b in group[i + 1 :]]
        return min(pairs, key=lambda link: link.bytes_per_s, default=None)
