"""When no layout fits: how far from fitting it is, in bits a weight, in context, in host memory and in cards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from cluster.errors import BadLayout
from cluster.topology import Device, Topology
from strategies.cost import estimate
from strategies.cost_memory import CAP_SLACK, Memory, memories
from strategies.engines import OURS, engine
from strategies.formats import FORMATS, PLAIN, Format
from strategies.offload import Room
from strategies.place import count, gb, place, shards
from strategies.plan import Layout, ParallelDims, Placement
from strategies.published import Stored
from strategies.quantize import as_kept, can_remake, native
from strategies.scheme import GGUF
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec, Workload

_MOST_CARDS = 64
_MOST_TP = 8  # ranks of one node
_FEWER_BITS = ("int8", "int4")
_ONE_REQUEST = Workload(concurrency=1)  # memory depends on a workload by its concurrency alone


def ways_out(spec: ModelSpec, topology: Topology, dtype: str, length: int) -> tuple[str, ...]:
    """Sentences, cheapest first: a higher limit, a format, the context, host memory, more cards. `length`: what context
    had to fit."""
    if not any(dtype in device.flops_per_s for device in topology.devices):  # which no memory mends
        return (f"No layout of {spec.name} runs on {topology.name} in {dtype}.",)
    best = max(topology.devices, key=lambda device: device.free_bytes)
    splits = list(_splits(len(topology.devices)))
    fitted = [p for tp, pp in splits if (p := _replica(spec, tp, pp, dtype, best, PLAIN)) is not None]
    ways = [
        _higher_limit(spec, splits, dtype, best, length),
        *(_fewer_bits(spec, splits, dtype, best, kept, length) for kept in _smaller(spec, best)),
        _shorter_context(fitted),
        _offload(spec, topology, dtype, length),
        _more_memory(spec, dtype, best, len(topology.devices), length),
    ]
    return (f"No layout of {spec.name} fits {topology.name} in {dtype}.", *(way for way in ways if way))


def _splits(devices: int) -> Iterator[tuple[int, int]]:
    """(tp, pp) of one replica over at most so many devices."""
    for pp in range(1, devices + 1):
        for tp in range(1, min(devices // pp, _MOST_TP) + 1):
            yield tp, pp


def _replica(spec: ModelSpec, tp: int, pp: int, dtype: str, device: Device, kept: Format) -> Placement | None:
    """A replica on tp × pp devices like `device`, for its memory; None where the model cannot be split."""
    n = tp * pp
    try:
        parts = shards(spec, tp, pp, (1.0,) * pp)
    except BadLayout:
        return None
    machine = Topology("", tuple(replace(device, index=i) for i in range(n)))
    return Placement(spec, ParallelDims(tp, pp), dtype, parts, machine, tuple(range(n)), engine(OURS), kept)


def _needs(placement: Placement) -> list[Memory]:
    return memories(placement, _ONE_REQUEST)


def _kv_tokens(placement: Placement) -> int:
    """Tokens of KV cache that fit the fullest rank; negative where the weights do not."""
    return min((n.free - n.fixed) // n.kv_per_token for n in _needs(placement))


def _higher_limit(
    spec: ModelSpec, splits: list[tuple[int, int]], dtype: str, device: Device, length: int
) -> str | None:
    """Of --device-memory-gb, where the cards have more."""
    if device.uncapped_bytes is None:
        return None
    held = [p for tp, pp in splits if (p := _replica(spec, tp, pp, dtype, device, native(spec))) is not None]
    fullest = [
        (max(n.fixed + length * n.kv_per_token for n in _needs(p)) / (1 - CAP_SLACK), p.dims.name)
        for p in held
    ]
    enough = [(need, name) for need, name in fullest if device.free_bytes < need <= device.uncapped_bytes]
    if not enough:
        return None
    need, name = min(enough)
    return (
        f"Higher limit: --device-memory-gb {math.ceil(need / 1e8) / 10} would hold it as {name}; "
        f"{gb(device.uncapped_bytes)} are free on each card."
    )


def _smaller(spec: ModelSpec, device: Device) -> list[Format]:
    stored = spec.published
    own = [as_kept(spec, FORMATS[GGUF], device.kind)] if stored and stored.stored is Stored.GGUF else []
    return [*own, *(FORMATS[name] for name in _FEWER_BITS)]


def _fewer_bits(
    spec: ModelSpec, splits: list[tuple[int, int]], dtype: str, device: Device, kept: Format, length: int
) -> str | None:
    """What quantized weights would take; what is chosen by itself keeps the model's precision."""

    def held(by: Device) -> list[Placement]:
        return [p for tp, pp in splits if (p := _replica(spec, tp, pp, dtype, by, kept)) is not None]

    if device.pool or not held(device):
        return None
    best, limit = max(held(device), key=_kv_tokens), ""
    if _kv_tokens(best) < length and device.uncapped_bytes is not None:  # would all of the card do?
        most = device.uncapped_bytes // 10**8 * 10**8
        best = max(held(replace(device, free_bytes=int((1 - CAP_SLACK) * most))), key=_kv_tokens)
        limit = f" --device-memory-gb {most / 1e9:g}"
    tokens, weights = _kv_tokens(best), sum(need.weights for need in _needs(best))
    bits = 8 * kept.bytes_per_weight(dtype)
    room = "still too much"
    if tokens >= length:
        exact = "the file's own weights" if kept.weights == GGUF else "answers change a little"
        room = f"room for {tokens:,} tokens beside them, as --layout {best.dims.name}{kept.suffix}{limit}; {exact}"
    return (
        f"Fewer bits: {kept.name} ({bits:.2g} bits a weight with its scales) would make the weights "
        f"{gb(weights)}, {room}."
    )


def _shorter_context(fitted: list[Placement]) -> str | None:
    tokens, name = max(((_kv_tokens(p), p.dims.name) for p in fitted), default=(0, ""))
    if tokens <= 0:
        return None
    return f"Shorter context: {name} has room for {tokens:,} tokens of prompt and output."


def _offload(spec: ModelSpec, topology: Topology, dtype: str, length: int) -> str | None:
    """What stays in host memory travels at every step: the step cannot be shorter than its way over the slots."""
    if topology.devices[0].pool:
        return None
    found = []
    lacks = []
    for dims in dict.fromkeys((ParallelDims(), ParallelDims(tp=len(topology.devices)))):
        try:
            placed = place(spec, Layout(dims, offload=True), dtype, topology, room=Room(longest=length))
        except BadLayout:
            continue
        needs = memories(placed, _ONE_REQUEST)
        if min(need.kv_tokens for need in needs) < length:
            continue
        name, streamed = placed.dims.name, sum(need.streamed for need in needs)
        if short := short_host(placed, _ONE_REQUEST):
            lacks.append((streamed, f"Offload: {name}+offload would keep {short}."))
            continue
        made = estimate(placed, Workload(prompt_tokens=max(1, length - 256), output_tokens=min(256, length)))
        found.append((made.tpot_s, name, streamed))
    if not found:
        return min(lacks)[1] if lacks else None
    tpot_s, name, streamed = min(found)
    return (
        f"Offload: {name}+offload would keep {gb(streamed)} in host memory and stream them at every step, "
        f"{tpot_s:.1f} s a token."
    )


# --- host memory --------------------------------------------------------------------------------------------


def short_host(placement: Placement, workload: Workload) -> str | None:
    """Why the hosts cannot lock what a layout keeps there, with the nearest way out; None where they can, or where
    nothing is known of them."""
    if placement.room.on_disk:
        return None
    lacking = _lacking(placement, memories(placement, workload))
    if lacking is None:
        return None
    need, have = lacking
    reason = f"{gb(need)} of {placement.format.weights or placement.dtype} weights in host memory, which has {gb(have)}"
    for kept in _smaller_than(placement):
        for layout in (Layout(placement.dims, kept), Layout(placement.dims, kept, offload=True)):
            pinned = _pinned(placement, layout, workload)
            if pinned is not None:
                there = f"keeps {gb(pinned)} there" if pinned else "needs none"
                return f"{reason} free; {layout.name} {there}"
    return f"{reason} free; generate, serve and compare keep them on a disk by --offload-dir FOLDER"


def _pinned(placement: Placement, layout: Layout, workload: Workload) -> int | None:
    """Bytes of host memory that another layout on the same devices takes; None where it does not fit them."""
    try:
        other = place(
            placement.spec,
            layout,
            placement.dtype,
            placement.topology,
            placement.engine,
            workload,
            placement.room,
        )
    except BadLayout:
        return None
    needs = memories(other, workload)
    fits = min(need.kv_tokens for need in needs) >= placement.room.longest
    return sum(need.pinned for need in needs) if fits and _lacking(other, needs) is None else None


def unknown_host(placement: Placement, needs: Sequence[Memory]) -> str | None:
    """What a host must have of which nothing is known. A CPU's own memory is the host's, and known."""
    cpu = placement.topology.devices[placement.devices[0]].kind == "cpu"
    if cpu or placement.room.on_disk or any(placement.topology.host_bytes.values()):
        return None
    pinned = sum(need.pinned for need in needs)
    return f"it takes {gb(pinned)} of host memory, of which nothing is known here: --host-memory-gb tells"


def _lacking(placement: Placement, needs: Sequence[Memory]) -> tuple[int, int] | None:
    """(bytes that are wanted, to be had beside KV blocks) of the node that lacks most."""
    wanted: dict[str, int] = {}
    ranks: dict[str, int] = {}
    for index, need in zip(placement.devices, needs, strict=True):
        node = placement.topology.devices[index].node
        wanted[node] = wanted.get(node, 0) + need.pinned
        ranks[node] = ranks.get(node, 0) + 1
    known = placement.topology.host_bytes
    left = {
        node: known[node] - n * placement.room.host_kv_bytes for node, n in ranks.items() if node in known
    }
    short = [(n, left[node]) for node, n in wanted.items() if node in left and n > max(0, left[node])]
    return max(short, key=lambda of: of[0] - of[1], default=None)


def _smaller_than(placement: Placement) -> Iterator[Format]:
    """Formats that take less a weight, and that the model may be kept in."""
    if not can_remake(placement.spec):
        return
    now = placement.format.bytes_per_weight(placement.dtype)
    yield from (FORMATS[n] for n in _FEWER_BITS if FORMATS[n].bytes_per_weight(placement.dtype) < now)


def _more_memory(spec: ModelSpec, dtype: str, device: Device, have: int, length: int) -> str | None:
    if device.pool:
        alone = _replica(spec, 1, 1, dtype, device, PLAIN)
        assert alone is not None, "tp1 splits nothing"
        (need,) = _needs(alone)
        total = need.fixed + length * need.kv_per_token
        return f"More memory: tp1 needs {gb(total)} free on the host, which has {gb(device.free_bytes)}."
    least = spec.total_params * BYTES_PER_ELEMENT[dtype] // device.free_bytes
    for n in range(max(have, least) + 1, _MOST_CARDS + 1):
        even = [tp for tp in range(min(n, _MOST_TP), 0, -1) if n % tp == 0 and spec.kv_heads % tp == 0]
        for tp in even:
            placement = _replica(spec, tp, n // tp, dtype, device, PLAIN)
            if placement is not None and _kv_tokens(placement) >= length:
                fullest = max(m.fixed + length * m.kv_per_token for m in _needs(placement))
                return (
                    f"More cards: {count(n, 'such card')} would hold it as {placement.dims.name}, "
                    f"{gb(fullest)} of the {gb(device.free_bytes)} free on each."
                )
    return None
