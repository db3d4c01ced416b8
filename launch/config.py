"""Recipes: a machine, and what to serve on it, as YAML. Parsed strictly, here and nowhere else.

A profile that `shardwise profile --out machine.json` wrote is read in a recipe's place. `--out machine.yaml` writes a
recipe (launch/recipe.py).

machine:                      # the only section that `--on` reads
  name: dual-4090             # default: the file's name
  nodes: 1                    # so many of the devices below, each
  devices:
    - device: rtx-4090        # a key or a driver's name of cluster/catalog.yaml; any name with all of * below
      count: 2                # the rest is optional, and stands in for the data sheet's figure
      pcie_lanes: 8
      memory_gb: 25.8         # *
      reserved_gb: 1.5        # held by a desktop, say; default 0.4
      gb_per_s: 1008          # * memory bandwidth
      tflops: {bfloat16: 165.2}  # *
      usd_per_hour: 0.6
  link: host                  # within a node; or {kind: host, latency_us: 15, gb_per_s: 12}
  links:                      # pairs of devices, by position, whose link is another
    - {between: [0, 1], kind: nvlink}
  network: {gb_per_s: 36}     # between nodes; latency_us too
  host_memory_gb: 64          # of each node, that offloaded weights may be locked in
model: {name, dtype, max_model_len, weights, seed}
objective: {prompt_tokens, output_tokens, concurrency, objective}
serve: {layout, address, host, port, api_key_file, …}: launch/up_recipe.py has them all
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.catalog import DRIVER_RESERVED_BYTES, Sheet, find, prior_link, prior_links, sheet
from cluster.errors import BadRecipe
from cluster.profile import apply, read
from cluster.topology import Device, Link, LinkKind, Topology
from strategies.spec import BYTES_PER_ELEMENT

RECIPES = Path(__file__).with_name("recipes")
MAX_DEVICES = 512  # 64 nodes of eight

_SECTIONS: Mapping[str, Sequence[str]] = {
    "machine": ("name", "nodes", "devices", "link", "links", "network", "host_memory_gb"),
    "model": ("name", "dtype", "max_model_len", "weights", "seed"),
    "objective": ("prompt_tokens", "output_tokens", "concurrency", "objective"),
    "serve": (
        "name",
        "layout",
        "address",
        "device",
        "host",
        "port",
        "api_key_file",
        "allow_without_key",
        "served_model_name",
        "batch_dir",
        "max_queue",
        "max_queue_tokens",
        "max_num_seqs",
        "max_num_batched_tokens",
        "gpu_memory_utilization",
        "device_memory_gb",
        "host_memory_gb",
        "resident_layers",
        "offload_dir",
        "host_kv_gb",
        "request_timeout_s",
        "step_timeout_s",
        "drain_timeout_s",
        "tool_call_parser",
        "access_log",
    ),
}
_DEVICE_KEYS = (
    "device",
    "count",
    "pcie_lanes",
    "memory_gb",
    "reserved_gb",
    "gb_per_s",
    "tflops",
    "usd_per_hour",
)
_NETWORK_KEYS = ("latency_us", "gb_per_s")
_LINK_KEYS = ("kind", *_NETWORK_KEYS)
_RATES = tuple(
    dict.fromkeys((*BYTES_PER_ELEMENT, "float8", "int8"))
)  # the dtypes that data sheets have rates of
_FULL_DESCRIPTION = ("memory_gb", "gb_per_s", "tflops")
_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """A YAML mapping whose keys are known; `where` names it in errors. Raises BadRecipe."""

    where: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, where: str, value: object, known: Sequence[str]) -> Fields:
        if not isinstance(value, dict):
            told = reprlib.repr(value)  # another kind of file is all one value
            raise BadRecipe(f"{where} is {told}; it must be a mapping of {', '.join(known)}")
        for key in value:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
                raise BadRecipe(f"{where} has an unknown key {key!r}; the nearest known is {near}")
        return cls(where, value)

    def text(self, key: str, default: object = _REQUIRED) -> str:
        value = self._get(key, default)
        if not isinstance(value, str) or not value:
            raise BadRecipe(f"{self.where}: {key} is {value!r}; it must be a string, and not empty")
        return value

    def integer(self, key: str, default: int, low: int, high: int) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise BadRecipe(
                f"{self.where}: {key} is {value!r}; it must be a whole number from {low} to {high}"
            )
        return value

    def number(self, key: str, default: object = _REQUIRED, *, or_zero: bool = False) -> float:
        value = self._get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and not or_zero):
            rule = "at least" if or_zero else "above"
            raise BadRecipe(f"{self.where}: {key} is {value!r}; it must be a number {rule} 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise BadRecipe(f"{self.where}: {key} is {value!r}; it must be true or false")
        return value

    def _get(self, key: str, default: object) -> Any:
        value = self.values.get(key)
        if value is None and default is _REQUIRED:
            raise BadRecipe(f"{self.where} lacks {key}")
        return default if value is None else value


def read_machine(recipe: str) -> Topology:
    """The machine of a recipe or a profile, given by path, or of a recipe that ships, by name. Raises BadRecipe."""
    path = find_recipe(recipe)
    if path.suffix == ".json":
        return _measured(path)
    machine = read_sections(path)["machine"]
    if machine is None:
        raise BadRecipe(f"{path} has no section machine, which says what devices there are")
    return machine_of(machine, path.stem)


def read_sections(path: Path) -> Mapping[str, Fields | None]:
    """Every section, its keys checked; None for those that the recipe lacks. Raises BadRecipe."""
    sections = Fields.of(str(path), _load(path), tuple(_SECTIONS))
    given = {name: sections.values.get(name) for name in _SECTIONS}
    return {
        name: None if value is None else Fields.of(f"{path}: {name}", value, _SECTIONS[name])
        for name, value in given.items()
    }


def _measured(path: Path) -> Topology:
    """The machine that a profile was taken of, as measured."""
    found = read(path)
    if found is None:
        raise BadRecipe(
            f"{path} is no profile of this version; write one by `shardwise profile --out {path.name}`"
        )
    dtypes = [
        dtype for dtype in ("bfloat16", "float16", "float32") if dtype in found.rates[0].bandwidth_bytes_per_s
    ]
    return apply(found, found.topology, dtypes[0])


def find_recipe(recipe: str) -> Path:
    """By path, or by the name of one that ships. Raises BadRecipe."""
    path = Path(recipe)
    if path.is_file():
        return path
    shipped = {p.stem: p for p in sorted(RECIPES.glob("*.yaml"))}
    if recipe in shipped:
        return shipped[recipe]
    what = f"{recipe} {'is a directory' if path.is_dir() else 'does not exist'}" if recipe else "has no name"
    raise BadRecipe(f"recipe {what}; give a YAML file, or one that ships: {', '.join(shipped)}")


def _load(path: Path) -> object:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml, where it is built in
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise BadRecipe(f"{path}{line} is not YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise BadRecipe(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if document is None:
        raise BadRecipe(f"{path} is empty; a recipe has the sections {', '.join(_SECTIONS)}")
    return document


def machine_of(machine: Fields, stem: str) -> Topology:
    rows = machine.values.get("devices")
    if not isinstance(rows, list) or not rows:
        rule = "a list such as [{device: rtx-4090, count: 2}]"
        raise BadRecipe(f"{machine.where}: devices is {rows!r}; it must be {rule}")
    entries = [Fields.of(f"{machine.where}: devices[{i}]", row, _DEVICE_KEYS) for i, row in enumerate(rows)]
    nodes = machine.integer("nodes", 1, 1, MAX_DEVICES)
    one_node = [entry for entry in entries for _ in range(entry.integer("count", 1, 1, MAX_DEVICES))]
    if nodes * len(one_node) > MAX_DEVICES:
        raise BadRecipe(
            f"{machine.where} has {nodes * len(one_node)} devices; at most {MAX_DEVICES} are planned for"
        )
    described = [(_sheet(entry), f"node{n}", entry) for n in range(nodes) for entry in one_node]
    devices = tuple(_device(i, s, node, entry) for i, (s, node, entry) in enumerate(described))
    links = _links(machine, [(s, node) for s, node, _ in described])
    host: dict[str, int] = {}
    if machine.values.get("host_memory_gb") is not None:
        host = dict.fromkeys((d.node for d in devices), int(machine.number("host_memory_gb") * 1e9))
    return Topology(machine.text("name", stem), devices, links, host_bytes=host)


def _sheet(entry: Fields) -> Sheet:
    """The data sheet, with the recipe's figures in place of its own."""
    base = _base_sheet(entry)
    flops_per_s = dict(base.flops_per_s)
    if entry.values.get("tflops") is not None:
        rates = Fields.of(f"{entry.where}: tflops", entry.values["tflops"], _RATES)
        flops_per_s = {dtype: rates.number(dtype) * 1e12 for dtype in rates.values}
    return replace(
        base,
        memory_bytes=int(entry.number("memory_gb", base.memory_bytes / 1e9) * 1e9),
        bandwidth_bytes_per_s=entry.number("gb_per_s", base.bandwidth_bytes_per_s / 1e9) * 1e9,
        flops_per_s=flops_per_s,
        pcie_lanes=entry.integer("pcie_lanes", base.pcie_lanes, 1, 16),
    )


def _base_sheet(entry: Fields) -> Sheet:
    name = entry.text("device")
    lacks = [key for key in _FULL_DESCRIPTION if entry.values.get(key) is None]
    if find(name) is None and not lacks:
        return _unknown(name)
    try:
        return sheet(name)
    except BadRecipe as error:
        raise BadRecipe(
            f"{entry.where}: {error}; or describe it in full: it lacks {', '.join(lacks)}"
        ) from None


def _unknown(name: str) -> Sheet:
    """A card that the catalogue lacks, to be described by the recipe; its links by the commonest slot and bridge."""
    return Sheet(
        key=name,
        names=(name,),
        kind="cuda",
        memory_bytes=0,
        bandwidth_bytes_per_s=0.0,
        flops_per_s={},
        nvlink_bytes_per_s=50e9,
        bridge=True,
        pcie_generation=4,
        pcie_lanes=16,
        peer_access=False,
        watts=0.0,
        price_usd=None,
        rent_usd_per_hour=None,
        source="the recipe",
    )


def _device(index: int, described: Sheet, node: str, entry: Fields) -> Device:
    reserved = entry.number("reserved_gb", DRIVER_RESERVED_BYTES / 1e9, or_zero=True)
    free = described.memory_bytes - int(reserved * 1e9)
    if free <= 0:
        have = f"{described.memory_bytes / 1e9:.1f} GB"
        raise BadRecipe(f"{entry.where}: reserved_gb is {reserved:g} of {have}; it must leave something")
    # The ranks of one host's CPU share its memory and cores.
    pool = node if described.kind == "cpu" else ""
    device = described.device(index, node, free_bytes=free, pool=pool)
    if entry.values.get("usd_per_hour") is None:
        return device
    return replace(device, usd_per_hour=entry.number("usd_per_hour", or_zero=True))


def _links(machine: Fields, placed: Sequence[tuple[Sheet, str]]) -> dict[tuple[int, int], Link]:
    links = _links_within(machine, placed)
    pairs = [] if machine.values.get("links") is None else machine.values["links"]
    if not isinstance(pairs, list):
        raise BadRecipe(
            f"{machine.where}: links is {pairs!r}; it must be a list such as [{{between: [0, 1], kind: nvlink}}]"
        )
    for i, row in enumerate(pairs):
        link = Fields.of(f"{machine.where}: links[{i}]", row, ("between", *_LINK_KEYS))
        a, b = _between(link, len(placed))
        links[a, b] = _given(prior_link(_kind(link), placed[a][0], placed[b][0]), link)
    if machine.values.get("network") is not None:
        network = Fields.of(f"{machine.where}: network", machine.values["network"], _NETWORK_KEYS)
        links |= {pair: _given(x, network) for pair, x in links.items() if x.kind is LinkKind.NETWORK}
    return links


def _between(link: Fields, devices: int) -> tuple[int, int]:
    pair = link.values.get("between")
    known = isinstance(pair, list) and all(type(n) is int and 0 <= n < devices for n in pair)
    if not isinstance(pair, list) or not known or len(set(pair)) != 2:
        rule = f"two positions from 0 to {devices - 1}, such as [0, 1]"
        raise BadRecipe(f"{link.where}: between is {pair!r}; it must be {rule}")
    return min(pair), max(pair)


def _links_within(machine: Fields, placed: Sequence[tuple[Sheet, str]]) -> dict[tuple[int, int], Link]:
    given = machine.values.get("link")
    if given is None:
        return prior_links(placed)
    link = Fields.of(
        f"{machine.where}: link", {"kind": given} if isinstance(given, str) else given, _LINK_KEYS
    )
    kind = _kind(link)
    return {
        pair: _given(prior, link) if placed[pair[0]][1] == placed[pair[1]][1] else prior
        for pair, prior in prior_links(placed, kind).items()
    }


def _kind(link: Fields) -> LinkKind:
    kinds = tuple(kind.value for kind in LinkKind)
    name = link.text("kind")
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)[0]
        raise BadRecipe(
            f"{link.where}: kind is {name!r}; the nearest known is {near} (of {', '.join(kinds)})"
        )
    return LinkKind(name)


def _given(prior: Link, link: Fields) -> Link:
    """The prior with the recipe's latency of two ranks, others in proportion, and its rate."""
    latency_s = link.number("latency_us", prior.latency_s * 1e6) * 1e-6
    by_ranks = {n: s * latency_s / prior.latency_s for n, s in prior.all_reduce_latency_s.items()}
    rate = link.number("gb_per_s", prior.bytes_per_s / 1e9) * 1e9
    return replace(prior, latency_s=latency_s, bytes_per_s=rate, all_reduce_latency_s=by_ranks)
