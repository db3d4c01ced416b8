"""Machines of several nodes: what an actor on each reports of its own, joined by the network between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster import catalog
from cluster.discover import discover
from cluster.network import Interface, fastest_interface
from cluster.topology import Device, Link, LinkKind, Topology

SHARE_OF_INTERFACE = 0.72
"""What a collective gets of an interface's rate: 36 of 50 GB/s (Vidur's tables, H100 nodes on 400 Gb/s InfiniBand)."""


@dataclass(frozen=True, slots=True)
class NodeReport:
    topology: Topology
    interface: Interface | None


class Reporter:
    """Hosted by a gang (cluster/gang.py) on a device of each node."""

    def report(self, device: str, peer_access: bool) -> NodeReport:
        return NodeReport(discover(device=device, peer_access=peer_access), fastest_interface())


def of_devices(report: NodeReport, taken: Sequence[int]) -> NodeReport:
    """A node with nothing but these of its GPUs, by position, or so many of its CPU's ranks at most."""
    found = report.topology
    is_cpu = found.devices[0].kind == "cpu"
    kept = list(range(min(len(taken), len(found.devices)))) if is_cpu else sorted(taken)
    place = {index: position for position, index in enumerate(kept)}
    devices = tuple(replace(found.devices[index], index=place[index]) for index in kept)
    links = {(place[a], place[b]): link for (a, b), link in found.links.items() if a in place and b in place}
    return replace(report, topology=replace(found, devices=devices, links=links))


def joined(name: str, nodes: Sequence[tuple[str, NodeReport]]) -> Topology:
    """One machine of (node's name, its report), devices node by node. The network is not measured: it is priced by the
    slower of two nodes' interfaces, or by the catalogue where neither tells its rate.
    """
    devices: list[Device] = []
    links: dict[tuple[int, int], Link] = {}
    for node, report in nodes:
        first = len(devices)
        pool = "" if report.topology.devices[0].kind == "cuda" else f"cpu:{node}"
        devices += [
            replace(device, index=first + device.index, node=node, pool=pool)
            for device in report.topology.devices
        ]
        links |= {(first + a, first + b): link for (a, b), link in report.topology.links.items()}
    interfaces = {node: report.interface for node, report in nodes}
    for a, b in itertools.combinations(devices, 2):
        if a.node != b.node:
            links[a.index, b.index] = _network(interfaces[a.node], interfaces[b.node])
    drivers = {report.topology.driver for _, report in nodes}
    host = {
        node: sum(report.topology.host_bytes.values()) for node, report in nodes if report.topology.host_bytes
    }
    return Topology(name, tuple(devices), links, drivers.pop() if len(drivers) == 1 else "", host)


def _network(a: Interface | None, b: Interface | None) -> Link:
    sheet = catalog.sheet("cpu")  # a network's constants depend on no device
    prior = catalog.prior_link(LinkKind.NETWORK, sheet, sheet)
    rates = [interface.bytes_per_s for interface in (a, b) if interface is not None]
    return replace(prior, bytes_per_s=SHARE_OF_INTERFACE * min(rates)) if rates else prior
