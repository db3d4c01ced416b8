"""The prior: data sheets of devices and constants of links, believed until this machine has been measured.

The figures and their sources are in catalog.yaml.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import BadRecipe
from cluster.topology import Device, Link, LinkKind, Provenance

_FILE = Path(__file__).with_name("catalog.yaml")
_LANE_BYTES_PER_S = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}  # PCIe, one direction, after encoding
_OWNED_HOURS = 3 * 365 * 24  # an owned card is paid off in three years
_USD_PER_KWH = 0.15
HOST_COPY = 0.78  # of the slot's raw rate, from pinned host memory: 24 to 26 of 31.5 GB/s on PCIe 4.0 x16
DRIVER_RESERVED_BYTES = (
    400_000_000  # firmware and page tables: a bare 4090 shows 25.3 to 25.4 of 25.8 GB free
)


@dataclass(frozen=True, slots=True)
class Sheet:
    """What the maker says of one device."""

    key: str
    names: tuple[str, ...]  # as the driver spells them
    kind: str  # "cuda" or "cpu"
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]  # dtype name -> dense matrix rate, float32 accumulation
    nvlink_bytes_per_s: float  # one direction, all links; 0 is none
    bridge: bool  # NVLink needs a bridge between pairs: not assumed
    pcie_generation: int
    pcie_lanes: int
    peer_access: bool  # over PCIe, with the stock driver
    watts: float
    price_usd: float | None
    rent_usd_per_hour: float | None
    source: str
    one_shot_s: float | None = None  # of a small sum in one kernel through peer memory; None: the links' own

    @property
    def pcie_bytes_per_s(self) -> float:
        """Raw rate of the slot in one direction."""
        return _LANE_BYTES_PER_S[self.pcie_generation] * self.pcie_lanes

    @property
    def usd_per_hour(self) -> float | None:
        """The rent on demand; of a card nobody rents out, its price over three years and its power."""
        if self.rent_usd_per_hour is not None:
            return self.rent_usd_per_hour
        if self.price_usd is None:
            return None
        return self.price_usd / _OWNED_HOURS + self.watts / 1000 * _USD_PER_KWH

    def device(
        self, index: int, node: str = "node0", *, free_bytes: int | None = None, pool: str = ""
    ) -> Device:
        """A Device as this sheet has it; free memory is all but the driver's own unless told."""
        free = self.memory_bytes - DRIVER_RESERVED_BYTES if free_bytes is None else free_bytes
        layer_s, step_s = _overheads(self.kind)
        return Device(
            index=index,
            node=node,
            kind=self.kind,
            name=self.names[0] if self.names else self.key,
            memory_bytes=self.memory_bytes,
            free_bytes=free,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s,
            flops_per_s=self.flops_per_s,
            step_overhead_s=step_s,
            layer_overhead_s=layer_s,
            pool=pool,
            usd_per_hour=self.usd_per_hour,
            host_bytes_per_s=None if self.kind == "cpu" else HOST_COPY * self.pcie_bytes_per_s,
        )


@functools.cache
def sheets() -> Mapping[str, Sheet]:
    """Every data sheet, by key."""
    return {key: _sheet(key, row) for key, row in _catalog()["devices"].items()}


def find(name: str) -> Sheet | None:
    """The sheet of a device by its key or by the driver's name for it, in any case; None if there is none."""
    return _by_name().get(_plain(name))


def sheet(name: str) -> Sheet:
    """As `find`. Raises BadRecipe, naming the nearest that is known."""
    found = find(name)
    if found is None:
        near = difflib.get_close_matches(_plain(name), _by_name(), n=1, cutoff=0.0)
        key = _by_name()[near[0]].key
        raise BadRecipe(f"unknown device {name!r}; the nearest known is {key} (of {len(sheets())})")
    return found


def link_kind(a: Sheet, b: Sheet, *, same_node: bool = True) -> LinkKind:
    """How two devices talk, by their sheets alone: bridges are not assumed."""
    if not same_node:
        return LinkKind.NETWORK
    if "cpu" in (a.kind, b.kind):
        return LinkKind.LOOPBACK
    if all(s.nvlink_bytes_per_s and not s.bridge for s in (a, b)):
        return LinkKind.NVLINK
    return LinkKind.PCIE if a.peer_access and b.peer_access else LinkKind.HOST


def prior_link(kind: LinkKind, a: Sheet, b: Sheet) -> Link:
    """The constants of a link that nobody has measured. Raises BadRecipe for NVLink on cards without it."""
    row = _catalog()["links"][kind.value]
    rates = [s.nvlink_bytes_per_s if kind is LinkKind.NVLINK else s.pcie_bytes_per_s for s in (a, b)]
    if not min(rates):
        name = (a, b)[rates.index(min(rates))].key
        raise BadRecipe(f"link nvlink, but the {name} has no NVLink; use pcie or host")
    latency_s = {int(n): us * 1e-6 for n, us in row["all_reduce_us"].items()}
    one_shot_s = row["one_shot_us"] * 1e-6 if "one_shot_us" in row else None
    if kind is LinkKind.NVLINK:
        one_shot_s = max((s.one_shot_s for s in (a, b) if s.one_shot_s is not None), default=one_shot_s)
    return Link(
        kind=kind,
        latency_s=latency_s[2],
        bytes_per_s=row["gb_per_s"] * 1e9 if "gb_per_s" in row else min(rates) * row["of_raw"],
        all_reduce_latency_s=latency_s,
        one_shot_s=one_shot_s,
        provenance=Provenance.TABLE,
    )


def prior_links(
    placed: Sequence[tuple[Sheet, str]], kind: LinkKind | None = None
) -> dict[tuple[int, int], Link]:
    """A link for each pair of devices, given as (sheet, node) by index.

    `kind` holds within a node; None: by the sheets.
    """
    links = {}
    known: dict[tuple[int, int, bool], Link] = {}  # of like pairs: a cluster has hundreds of thousands
    for (i, (a, node_a)), (j, (b, node_b)) in itertools.combinations(enumerate(placed), 2):
        same_node = node_a == node_b
        pair = (id(a), id(b), same_node)
        if pair not in known:
            between = kind if kind and same_node else link_kind(a, b, same_node=same_node)
            known[pair] = prior_link(between, a, b)
        links[i, j] = known[pair]
    return links


@functools.cache
def _catalog() -> Mapping[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, ten times faster, where it is built in
    catalog: Mapping[str, Any] = yaml.load(_FILE.read_text(encoding="utf-8"), Loader=loader)
    return catalog


@functools.cache
def _by_name() -> Mapping[str, Sheet]:
    return {_plain(name): s for s in sheets().values() for name in (s.key, *s.names)}


def _plain(name: str) -> str:
    """`NVIDIA GeForce RTX 4090` and `rtx-4090` are one name."""
    return re.sub(r"[^a-z0-9]|nvidia|geforce|tesla", "", name.lower())


def _overheads(kind: str) -> tuple[float, float]:
    """Seconds that a layer and a step cost however small they are."""
    row = _catalog()["overheads"][kind]
    return row["layer_us"] * 1e-6, row["step_us"] * 1e-6


def _sheet(key: str, row: Mapping[str, Any]) -> Sheet:
    generation, lanes = map(int, row["pcie"].split("x"))
    mib = row["driver_mib"] if "driver_mib" in row else row["nominal_gib"] * 1024
    return Sheet(
        key=key,
        names=tuple(row.get("names", ())),
        kind=row.get("kind", "cuda"),
        memory_bytes=int(mib * 2**20),
        bandwidth_bytes_per_s=row["gb_per_s"] * 1e9,
        flops_per_s={dtype: rate * 1e12 for dtype, rate in row["tflops"].items()},
        nvlink_bytes_per_s=row.get("nvlink_gb_per_s", 0) * 1e9 / 2,
        bridge=row.get("bridge", False),
        pcie_generation=generation,
        pcie_lanes=lanes,
        peer_access=row["peer_access"],
        watts=row["watts"],
        price_usd=row.get("price_usd"),
        rent_usd_per_hour=row.get("rent_usd_per_hour"),
        source=_catalog()["sources"][row["source"]],
        one_shot_s=row["one_shot_us"] * 1e-6 if "one_shot_us" in row else None,
    )
