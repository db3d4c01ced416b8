"""The machine that a Ray cluster is: each node asked by an actor on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.gang import Gang, results
from cluster.nodes import NodeReport, Reporter, joined, of_devices
from cluster.topology import Topology
from launch.machine import peers_allowed
from launch.progress import Progress

PLACE_LIMIT_S = 60.0
REPORT_LIMIT_S = 30.0


class Nodes(Protocol):
    """What this needs of cluster.actors.Cluster."""

    def count(self, device: str) -> int: ...

    def free(self, device: str) -> int: ...

    def acquire(
        self, worker_class: type, sizes: Sequence[int], device: str, *, timeout_s: float
    ) -> Sequence[Gang]: ...


def cluster_machine(address: str, device: str | None, progress: Progress) -> Topology:
    """All nodes of the cluster at `address`. Raises PlacementFailed."""
    from cluster.actors import Cluster

    progress.say(f"connecting to the Ray cluster at {address}")
    with Cluster.connect(address) as found:
        return ask_nodes(found, f"Ray cluster at {address}", device, progress)


def free_machine(address: str, device: str, progress: Progress) -> Topology:
    """Of the cluster at `address`, what nobody holds. Raises PlacementFailed where that is nothing."""
    from cluster.actors import Cluster

    progress.say(f"looking for what is free in the Ray cluster at {address}")
    with Cluster.connect(address) as found:
        return ask_nodes(found, f"Ray cluster at {address}", device, progress, only_free=True)


def ask_nodes(
    found: Nodes, name: str, device: str | None, progress: Progress, *, only_free: bool = False
) -> Topology:
    """`device` None: its GPUs, if it has any. Raises PlacementFailed where others hold devices, but `only_free`."""
    kind = device or ("cuda" if found.count("cuda") else "cpu")
    count = max(1, found.free(kind) if only_free else found.count(kind))
    progress.say(f"asking its nodes, by {count} actor{'s' * (count > 1)}, each on a device")
    [gang] = found.acquire(Reporter, [count], kind, timeout_s=PLACE_LIMIT_S)
    try:
        first = {member.node_id: member for member in reversed(gang.members)}
        calls = [gang.call(member.index, "report", kind, peers_allowed()) for member in first.values()]
        reports: list[NodeReport] = results(calls, REPORT_LIMIT_S)
    finally:
        gang.kill()
    ours = {node_id: [m.device for m in gang.members if m.node_id == node_id] for node_id in first}
    nodes = [
        (f"{member.node}, {node_id[:8]}", of_devices(report, ours[node_id]) if only_free else report)
        for (node_id, member), report in zip(first.items(), reports, strict=True)
    ]  # several nodes of a cluster may be on one host
    return joined(name, sorted(nodes, key=lambda node: node[0]))
