"""A Topology as a recipe: what launch/config.py reads back, and people edit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from cluster.catalog import find
from cluster.errors import BadRecipe
from cluster.topology import Device, Link, LinkKind, Topology


def to_recipe(topology: Topology, comment: str) -> str:
    """YAML with every figure of devices and links. Raises BadRecipe where nodes differ, which a recipe cannot say."""
    machine: dict[str, Any] = {"name": topology.name}
    nodes = list(dict.fromkeys(device.node for device in topology.devices))
    counts = {len([d for d in topology.devices if d.node == node]) for node in nodes}
    rows = _like_the_fullest([[_device(d) for d in topology.devices if d.node == node] for node in nodes])
    if len(counts) > 1 or any(row != rows[0] for row in rows):
        raise BadRecipe(f"{topology.name} has nodes that differ; a recipe describes nodes that are alike")
    if len(nodes) > 1:
        machine["nodes"] = len(nodes)
    machine["devices"] = _counted(rows[0])
    machine |= _links(topology)
    if topology.host_bytes:
        machine["host_memory_gb"] = _rounded(min(topology.host_bytes.values()) / 1e9)
    text = yaml.safe_dump(
        {"machine": machine}, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110
    )
    return "".join(f"# {line}\n" for line in comment.splitlines()) + text


def _like_the_fullest(nodes: list[list[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Memory that others hold differs from node to node: each device is given what its fullest counterpart has left."""
    held = [max(row["reserved_gb"] for row in places) for places in zip(*nodes, strict=False)]
    return [[{**row, "reserved_gb": gb} for row, gb in zip(node, held, strict=False)] for node in nodes]


def _device(device: Device) -> dict[str, Any]:
    described = find(device.name)
    row: dict[str, Any] = {
        "device": device.kind if device.kind == "cpu" else described.key if described else device.name,
        "memory_gb": device.memory_bytes / 1e9,
        "reserved_gb": (device.memory_bytes - device.free_bytes) / 1e9,
        "gb_per_s": _rounded(device.bandwidth_bytes_per_s / 1e9),
        "tflops": {dtype: _rounded(rate / 1e12) for dtype, rate in device.flops_per_s.items()},
    }
    if device.usd_per_hour is not None:
        row["usd_per_hour"] = device.usd_per_hour
    return row


def _counted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Equal neighbours in one row, with a count."""
    counted: list[dict[str, Any]] = []
    for row in rows:
        if counted and {k: v for k, v in counted[-1].items() if k != "count"} == row:
            counted[-1]["count"] += 1
        else:
            counted.append({"device": row["device"], "count": 1, **row})
    return counted


def _links(topology: Topology) -> dict[str, Any]:
    """The commonest link within a node, pairs that differ from it, and the network."""
    described = {pair: _link(link) for pair, link in sorted(topology.links.items())}
    within = {pair: row for pair, row in described.items() if row["kind"] != LinkKind.NETWORK.value}
    made: dict[str, Any] = {}
    if within:
        [(commonest, _)] = Counter(_frozen(row) for row in within.values()).most_common(1)
        made["link"] = dict(commonest)
        others = [{"between": list(pair), **row} for pair, row in within.items() if _frozen(row) != commonest]
        if others:
            made["links"] = others
    network = next((row for row in described.values() if row["kind"] == LinkKind.NETWORK.value), None)
    if network is not None:
        made["network"] = {key: network[key] for key in ("latency_us", "gb_per_s")}
    return made


def _link(link: Link) -> dict[str, Any]:
    return {
        "kind": link.kind.value,
        "latency_us": _rounded(link.latency_s * 1e6),
        "gb_per_s": _rounded(link.bytes_per_s / 1e9),
    }


def _frozen(row: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(row.items())


def _rounded(number: float) -> float:
    """To four figures: nothing here is known more closely."""
    return float(f"{number:.4g}")
