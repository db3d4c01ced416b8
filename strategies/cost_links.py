"""What collectives and sends take on a link.

Measured curves of this machine come first. Without them a small sum takes one kernel where there is a path for it (peer
memory, or host memory mapped by all ranks, if the engine has such), a large one NCCL's ring.
Sources: NCCL's tuning model; curves of A100, H100, H200, B200, L40S and RTX PRO 6000 in aiconfigurator's tables.
"""

from __future__ import annotations

import functools

from cluster.paths import Op, best_path
from cluster.topology import Link, LinkKind, Topology

# A one-kernel sum in two phases (reduce-scatter, all-gather) starts so many times later than in one.
_TWO_PHASES = 2.2
# NCCL's share of the link's two-rank rate: rings of many ranks keep NVLink fuller (H100 260, 305, 374 GB/s at 2, 4
# and 8 ranks), and meet on PCIe's roots (RTX PRO 6000 34.7, 24.5, 22.1).
_NVLINK_PER_RANK = 0.05
_NVLINK_MOST = 1.2
_PCIE_BEYOND_TWO = 0.68
_HOST_SHARED = (
    0.35  # host memory serves all ranks: eight 5090s reach 28 GB/s where four reach 35 (nccl issue 1639)
)


class ByIdentity:
    """A topology as a key, by identity: comparing hundreds of devices and links takes longer than what is kept."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and other.topology is self.topology

    def __hash__(self) -> int:
        return id(self.topology)


@functools.lru_cache(maxsize=4096)
def slowest_link(key: ByIdentity, group: tuple[int, ...]) -> Link | None:
    """The link that bounds a collective over devices; None for one device."""
    return key.topology.slowest(group)


def all_reduce_latency_s(link: Link, ranks: int) -> float:
    """Of a small all-reduce by NCCL: the link's own figures by ranks, straight lines between; else a ring's law.

    The law, base + hops, fits NCCL on H100 over 2, 4 and 8 ranks within 2 % (6.9, 10.5, 17.5 µs).
    """
    known = sorted(link.all_reduce_latency_s.items())
    if ranks in link.all_reduce_latency_s:
        return link.all_reduce_latency_s[ranks]
    if len(known) < 2:
        return link.latency_s * (ranks + 2) / 4
    # The two known points around `ranks`, or the two nearest it.
    after = min(max(sum(n < ranks for n, _ in known), 1), len(known) - 1)
    (n0, t0), (n1, t1) = known[after - 1 : after + 1]
    return t0 + (t1 - t0) * (ranks - n0) / (n1 - n0)


def all_reduce_s(link: Link, ranks: int, n_bytes: float, *, mapped: bool = False) -> float:
    """The best path's time in a CUDA graph. `mapped`: the engine sums through mapped host memory as well."""
    if link.curves:
        best = best_path(link.curves, Op.ALL_REDUCE, ranks, n_bytes, in_graph=True)
        best = best or best_path(link.curves, Op.ALL_REDUCE, ranks, n_bytes, in_graph=False)
        if best is not None:
            return best.seconds
    moved = 2 * (ranks - 1) / ranks * n_bytes
    ring = all_reduce_latency_s(link, ranks) + moved / _ring_rate(link, ranks)
    if link.one_shot_s is None or not _has_one_shot(link, ranks, mapped):
        return ring
    one = link.one_shot_s + (ranks - 1) * n_bytes / link.bytes_per_s
    two = _TWO_PHASES * link.one_shot_s + moved / link.bytes_per_s
    return min(one, two, ring)


def _has_one_shot(link: Link, ranks: int, mapped: bool) -> bool:
    """Engines sum by peer memory over NVLink, and over PCIe between two cards; beyond, roots of PCIe are crossed."""
    if link.kind is LinkKind.HOST:
        return mapped
    return link.kind is LinkKind.NVLINK or (link.kind is LinkKind.PCIE and ranks == 2)


def _ring_rate(link: Link, ranks: int) -> float:
    if link.kind is LinkKind.NVLINK:
        return link.bytes_per_s * min(_NVLINK_MOST, 0.9 + _NVLINK_PER_RANK * (ranks - 2))
    if link.kind is LinkKind.PCIE and ranks > 2:
        return link.bytes_per_s * _PCIE_BEYOND_TWO
    if link.kind is LinkKind.HOST:
        return link.bytes_per_s * float((2 / ranks) ** _HOST_SHARED)
    return link.bytes_per_s


def all_gather_s(link: Link, ranks: int, n_bytes: float) -> float:
    """`n_bytes` in all; each rank lacks (n−1)/n of them."""
    return all_reduce_latency_s(link, ranks) + (ranks - 1) / ranks * n_bytes / link.bytes_per_s


def send_recv_s(link: Link, n_bytes: float) -> float:
    return link.latency_s + n_bytes / link.bytes_per_s
