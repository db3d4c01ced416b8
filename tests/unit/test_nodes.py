"""Nodes that report their own, joined into one machine."""

from __future__ import annotations

import pytest

from cluster.discover import Cpu, cpu_topology, discover
from cluster.network import Interface
from cluster.nodes import NodeReport, joined
from cluster.topology import LinkKind
from tests.fake_nvml import dual_4090, dual_h100

FAST, SLOW = Interface("mlx5_0:1", 50e9), Interface("eth0", 3.125e9)
H100S = discover(binding=dual_h100())


def test_devices_are_counted_through_and_nodes_are_joined_by_the_slower_interface() -> None:
    machine = joined(
        "three",
        [
            ("10.0.0.1", NodeReport(H100S, FAST)),
            ("10.0.0.2", NodeReport(H100S, FAST)),
            ("10.0.0.3", NodeReport(discover(binding=dual_4090()), SLOW)),
        ],
    )
    assert [device.index for device in machine.devices] == list(range(6))
    assert [device.node[-1] for device in machine.devices] == list("112233")
    kinds = {pair: machine.link(*pair).kind for pair in ((0, 1), (2, 3), (4, 5), (1, 2), (3, 4))}
    assert list(kinds.values()) == [LinkKind.NVLINK, LinkKind.NVLINK, LinkKind.HOST, *[LinkKind.NETWORK] * 2]
    assert machine.link(1, 2).bytes_per_s == pytest.approx(36e9)
    assert machine.link(3, 4).bytes_per_s == pytest.approx(0.72 * 3.125e9)
    assert len(machine.links) == 15
    assert machine.driver == "550.54.14"


def test_hosts_of_cpus_share_no_memory_and_an_unknown_network_is_the_catalogues() -> None:
    host = NodeReport(cpu_topology(2, Cpu("Some CPU", 2, 1 << 34, 1 << 33)), None)
    machine = joined("two", [("a", host), ("b", host)])
    assert [device.pool for device in machine.devices] == ["cpu:a", "cpu:a", "cpu:b", "cpu:b"]
    assert machine.link(0, 1).kind is LinkKind.LOOPBACK
    assert machine.link(1, 2).bytes_per_s == 36e9
