"""Which devices form each group, and whether what they must hold fits: the feasibility half of planning."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from cluster.errors import BadLayout
from cluster.topology import Device, Topology
from strategies.cost_links import ByIdentity
from strategies.cost_memory import Memory, memories
from strategies.engines import CPU, OURS, Engine
from strategies.engines import engine as engine_named
from strategies.formats import PLAIN, Format
from strategies.offload import Room
from strategies.pipeline import shard_replica
from strategies.plan import Layout, ParallelDims, Placement, Shard
from strategies.quantize import as_kept
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec, Workload

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


EQUAL_SPEED = 0.9
"""Stages whose speeds differ by less get equal layers: two measurements of one card may differ by as much."""


def place(
    spec: ModelSpec,
    layout: Layout | ParallelDims,
    dtype: str,
    topology: Topology,
    engine: Engine | None = None,
    workload: Workload = Workload(),  # noqa: B008 (frozen)
    room: Room | None = None,
) -> Placement:
    """Puts a layout on the devices that suit it. Raises BadLayout where model or machine cannot be split.

    `engine`: ours by default. `workload` decides what the head weighs where stages are cut, and, without a `room` that
    says so, how much of a cache offloading leaves room for.
    """
    layout = Layout(layout) if isinstance(layout, ParallelDims) else layout
    dims, kept = layout.dims, as_kept(spec, layout.format, topology.devices[0].kind)
    if dims.ep > 1 and (spec.experts is None or dims.ep > spec.experts.count):
        experts = "no experts" if spec.experts is None else f"{spec.experts.count} experts a layer"
        raise BadLayout(f"ep={dims.ep} splits experts; {spec.name} has {experts}")
    have = len(topology.devices)
    if dims.world_size > have:
        raise BadLayout(f"{dims.name} needs {count(dims.world_size, 'device')}; {topology.name} has {have}")
    devices = choose_devices(topology, dims)
    for device in (topology.devices[i] for i in devices):
        if dtype not in device.flops_per_s:
            known = ", ".join(name for name in device.flops_per_s if name in BYTES_PER_ELEMENT)
            raise BadLayout(f"the {device.name} computes in {known}, not in {dtype}; choose with --dtype")
    stages = [devices[s * dims.tp : (s + 1) * dims.tp] for s in range(dims.pp)]
    rates = [min(topology.devices[i].bandwidth_bytes_per_s for i in stage) for stage in stages]
    speeds = tuple(max(rates) if rate > EQUAL_SPEED * max(rates) else rate for rate in rates)
    sequences = -(-workload.concurrency // dims.dp)
    of_replica = Workload(workload.prompt_tokens, workload.output_tokens, sequences)
    parts = shards(spec, dims.tp, dims.pp, speeds, of_replica, kept)
    if engine is None:
        engine = engine_named(CPU if topology.devices[devices[0]].kind == "cpu" else OURS)
    room = room or Room()
    length = workload.prompt_tokens + workload.output_tokens
    cached = room.cached or cache_tokens(dims, engine, workload)
    room = replace(room, longest=room.longest or length, cached=cached)
    how = kept, layout.offload, layout.zero3, room
    return Placement(spec, dims, dtype, parts, topology, devices, engine, *how)


def cache_tokens(dims: ParallelDims, engine: Engine, workload: Workload) -> int:
    """Of a replica's sequences that run at once."""
    sequences = min(-(-workload.concurrency // dims.dp), engine.max_sequences)
    return sequences * (workload.prompt_tokens + workload.output_tokens)


@functools.lru_cache(maxsize=256)
def shards(
    spec: ModelSpec,
    tp: int,
    pp: int,
    speeds: tuple[float, ...],
    workload: Workload = Workload(),  # noqa: B008 (frozen)
    kept: Format = PLAIN,
) -> tuple[Shard, ...]:
    """Of one replica; remembered, for the layouts of one machine ask for the same again and again."""
    return shard_replica(spec, ParallelDims(tp, pp), speeds, workload, kept)


def choose_devices(topology: Topology, dims: ParallelDims) -> tuple[int, ...]:
    """Device indices in rank order: a tp group takes the best device left, then those with fast links to it.

    Greedy: right where links come in islands (NVLink pairs, nodes), which is how machines are built.
    """
    return _groups(ByIdentity(topology), dims.tp)[: dims.world_size]


@functools.lru_cache(maxsize=64)
def _groups(key: ByIdentity, tp: int) -> tuple[int, ...]:
    """All devices in groups of tp, as far as they go; a group stays on one node where there are enough left."""
    topology = key.topology
    left = sorted(range(len(topology.devices)), key=lambda i: (-topology.devices[i].bandwidth_bytes_per_s, i))
    ordered: list[int] = []
    while len(left) >= tp:
        group = [left.pop(0)]
        home = topology.devices[group[0]].node
        near = [i for i in left if topology.devices[i].node == home]
        among = near if len(near) >= tp - 1 else left
        while len(group) < tp:
            group.append(max(among, key=lambda i: min(topology.link(i, g).bytes_per_s for g in group)))
            among.remove(group[-1])
            if among is not left:
                left.remove(group[-1])
        ordered += sorted(group)
    return tuple(ordered)


def rejection(placement: Placement, workload: Workload, max_model_len: int | None) -> str | None:
    """Why a layout cannot hold one sequence of the longest length, as arithmetic; None if it can."""
    length = max_model_len or workload.prompt_tokens + workload.output_tokens
    needs = memories(placement, workload)
    need = min(needs, key=lambda n: n.free - n.fixed - length * n.kv_per_token)
    if need.kv_tokens >= length:
        return None
    if need.weights > need.free:
        fullest = f"{gb(need.weights)} on the fullest, " if placement.dims.replica_size > 1 else ""
        return f"{_weights(placement, needs)} over {_cards(placement)}: {fullest}{_room(placement, need)}"
    rest = f"{gb(need.weights)} of weights and {gb(need.fixed - need.weights)} of activations and runtime"
    if need.fixed > need.free:
        return f"{rest} a {_noun(placement)}: {gb(need.fixed)} of {_room(placement, need)}"
    return (
        f"{length:,} tokens of context need {gb(length * need.kv_per_token)} of KV cache beside {rest}: "
        f"{gb(need.free - need.fixed)} of {gb(need.free)} is left, {need.kv_tokens:,} tokens"
    )


def _room(placement: Placement, need: Memory) -> str:
    """`25.4 GB free`, or the part of them that the engine takes."""
    devices = (placement.topology.devices[i] for i in placement.devices)
    whole = max((d.uncapped_bytes for d in devices if d.uncapped_bytes is not None), default=need.free)
    return f"{gb(need.free)} free" if need.free >= whole else f"{gb(need.free)} to take of {gb(whole)} free"


def count(n: int, noun: str) -> str:
    """`two cards`, `16 devices`."""
    return f"{_NUMBERS[n] if n < len(_NUMBERS) else n} {noun}{'' if n == 1 else 's'}"


def gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f} GB"


def _weights(placement: Placement, needs: Sequence[Memory]) -> str:
    """Of the model once: replicated KV heads are the ranks' own affair."""
    size = sum(need.weights for need in needs[: placement.dims.replica_size])
    return f"{gb(size)} of {placement.format.weights or placement.dtype} weights"


def _noun(placement: Placement) -> str:
    return "rank" if placement.device(0, 0).pool else "card"


def _cards(placement: Placement) -> str:
    """`two cards of 25.8 GB`, `two cards of 25.8 and 34.2 GB`, `two ranks that share 16.0 GB`."""
    devices: list[Device] = [placement.device(0, r) for r in range(placement.dims.replica_size)]
    sizes = sorted({round(d.memory_bytes / 1e9, 1) for d in devices})
    cards = count(len(devices), _noun(placement))
    joint = "that share" if placement.device(0, 0).pool and len(devices) > 1 else "of"
    return f"{cards} {joint} {' and '.join(f'{size:.1f}' for size in sizes)} GB"
