"""Machines and models for tests of planning: sizes of published configs, and boxes by their data sheets."""

from __future__ import annotations

from dataclasses import replace

from cluster import catalog
from cluster.topology import Link, LinkKind, Topology
from strategies.spec import ModelSpec, RopeSpec

LLAMA_8B = ModelSpec(
    name="Llama-3.1-8B",
    family="llama",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    intermediate=14336,
    vocab=128256,
    max_positions=131072,
    rms_eps=1e-5,
    rope=RopeSpec(),
)
LLAMA_70B = replace(LLAMA_8B, name="Llama-3.3-70B", layers=80, hidden=8192, heads=64, intermediate=28672)
SMOL = replace(
    LLAMA_8B,
    name="SmolLM2-135M",
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    intermediate=1536,
    vocab=49152,
    max_positions=8192,
    tied=True,
)


def box(key: str, n: int, kind: LinkKind | None = None, pool: str = "") -> Topology:
    """So many of one device of the catalogue on one node."""
    sheet = catalog.sheet(key)
    devices = tuple(sheet.device(i, pool=pool) for i in range(n))
    return Topology(f"{n} × {key}", devices, catalog.prior_links([(sheet, "node0")] * n, kind))


def with_links(topology: Topology, **changes: float) -> Topology:
    return replace(topology, links={pair: replace(link, **changes) for pair, link in topology.links.items()})


def with_devices(topology: Topology, **changes: object) -> Topology:
    return replace(topology, devices=tuple(replace(device, **changes) for device in topology.devices))


def link(latency_us: float, gb_per_s: float) -> Link:
    return Link(LinkKind.HOST, latency_us * 1e-6, gb_per_s * 1e9)
