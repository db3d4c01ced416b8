"""Enumerate, reject with the arithmetic, estimate, rank, explain."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cluster.errors import BadLayout
from cluster.topology import Topology
from strategies.cost import estimate, score
from strategies.cost_memory import memories
from strategies.engines import Engine
from strategies.explain import explain, explain_planned_only, ms
from strategies.formats import FORMATS, PLAIN, Format
from strategies.intervals import spread
from strategies.kept import MODEL, Kept, informed
from strategies.offload import Room
from strategies.place import place, rejection
from strategies.plan import Candidate, Estimate, Layout, ParallelDims, Placement, Plan
from strategies.quantize import can_remake, kept_on, native, or_native
from strategies.runnable import is_known, lacking, why_not
from strategies.spec import ModelSpec, Workload
from strategies.ways_out import short_host, unknown_host, ways_out

MOST_TP = 16
"""Ranks of a tp group on machines of many nodes: beyond, sums over the network cost more than they save."""

MOST_EP = 64
"""Ranks that experts are spread over: beyond, each holds few experts and all wait for the fullest."""

MOST_STREAMED = 3  # layouts beside the chosen one, of which it is told how much of them is streamed

_SEARCHED = ("fp8", "int8", "int4", "fp4", "fp8+kvfp8", "int4+kvfp8")
_SEARCHED_WIDELY = ("fp8", "int4")  # on machines of over 64 devices


Judged = tuple[Candidate, Placement | None]
"""No placement where a layout cannot be split so."""


def plan(
    spec: ModelSpec,
    topology: Topology,
    workload: Workload,
    dtype: str,
    *,
    layouts: Sequence[Layout | ParallelDims] | None = None,
    max_model_len: int | None = None,
    wide: bool = False,
    engine: Engine | None = None,
    cut_for: Workload | None = None,
    kept: Sequence[Kept] = (),
    room: Room | None = None,
) -> Plan:
    """The best layout for the workload's objective among `layouts`, or among all that the machine could hold.

    Every candidate is kept: the feasible ones that this version runs from best to worst, then those that it only plans,
    then the others with their reasons. The chosen one can be run. `max_model_len` is the longest sequence to make room
    for; by default the workload's own. `wide`: formats, offload and expert parallelism are searched as well; where
    nothing fits in the model's own precision, what is offloaded may be chosen, and fewer bits where that does not fit
    either. `engine`: ours as it comes by default. `cut_for`: stages are cut as for this workload, and offloading leaves
    room for its sequences, by default those of the one that is planned for. `kept`: what was measured of this model on
    this machine. `room`: what offloading leaves room for, in place of that.
    """
    spec = kept_on(topology.devices[0].kind, spec)
    if layouts is not None:
        named_ones = [item if isinstance(item, Layout) else Layout(item) for item in layouts]
        tried = [replace(layout, format=or_native(spec, layout.format)) for layout in named_ones]
    else:
        tried = [Layout(dims, native(spec)) for dims in enumerate_layouts(len(topology.devices))]

    longest = max_model_len or workload.prompt_tokens + workload.output_tokens
    room = replace(room or Room(), longest=max(longest, room.longest if room else 0))

    def judge(layout: Layout, named: bool) -> Judged:
        cut = cut_for or workload
        return _judge(
            spec, layout, topology, workload, dtype, max_model_len, engine, cut, kept, room, named=named
        )

    judged = [judge(layout, True) for layout in tried]
    why: tuple[str, ...] = ()
    if wide and layouts is None:
        if can_remake(spec):
            others = beyond_plain(spec, topology, [layout.dims for layout in tried])
            judged += [judge(layout, False) for layout in others]
        if not any(c.feasible and c.not_runnable is None for c, _ in judged):
            judged, why = _beyond_memory(spec, topology, judged, judge)
    feasible = [(c, p) for c, p in judged if p is not None and c.feasible]
    feasible.sort(key=lambda pair: _rank(pair[0], workload))
    runs = [(c, p) for c, p in feasible if c.not_runnable is None]
    chosen = runs[0][0] if runs and not over_limits(runs[0][0].estimate, workload) else None
    planned = [(c, p) for c, p in feasible if c.not_runnable is not None]
    sentences: tuple[str, ...] = ()
    if runs:
        streamed = [f"{c.layout.name}: {c.marked[-1]}." for c, _ in runs[1:] if c.offload]
        sentences = (*why, *explain(runs, workload), *streamed[:MOST_STREAMED])
        if why:
            ways = ways_out(spec, topology, dtype, longest)[1:]
            sentences += tuple(way for way in ways if not way.startswith("Offload"))
        if chosen is None:
            nearest = runs[0][0]
            missed = " and ".join(over_limits(nearest.estimate, workload))
            sentences = (
                f"No layout that runs keeps the limits; {nearest.layout.name} is nearest: {missed}.",
                *sentences,
            )
    elif not planned or spec.is_dense:
        sentences = _instead(spec, topology, workload, dtype, layouts, max_model_len)
    sentences += explain_planned_only(planned, runs[0][0] if runs else None, workload)
    candidates = (*(c for c, _ in runs), *(c for c, _ in planned), *(c for c, _ in judged if not c.feasible))
    return Plan(spec.name, topology.name, candidates, chosen, sentences)


def _instead(
    spec: ModelSpec,
    topology: Topology,
    workload: Workload,
    dtype: str,
    layouts: Sequence[Layout | ParallelDims] | None,
    max_model_len: int | None,
) -> tuple[str, ...]:
    """What to do where nothing that was tried fits: take what was not asked for, or change what there is."""
    if layouts is not None:
        best = plan(spec, topology, workload, dtype, max_model_len=max_model_len).chosen
        if best is not None:
            return (f"{best.layout.name} fits {topology.name}, and would be chosen.",)
    length = max_model_len or workload.prompt_tokens + workload.output_tokens
    return ways_out(spec, topology, dtype, length)


def enumerate_layouts(devices: int) -> list[ParallelDims]:
    """Every tp × pp × dp that so many devices can hold, small ones first: some may be better left out.

    Over eight devices each size is a power of two or divides their number, lest there be hundreds; over 64 what uses
    less than half of them is left out too, and wide tp.
    """
    sizes = [n for n in range(1, devices + 1) if devices <= 8 or devices % n == 0 or n & (n - 1) == 0]
    every = [
        ParallelDims(tp, pp, dp)
        for tp, pp, dp in itertools.product(sizes, repeat=3)
        if tp * pp * dp <= devices
        and (devices <= 64 or (2 * tp * pp * dp >= devices and tp <= MOST_TP and pp <= MOST_TP))
    ]
    return sorted(every, key=lambda dims: (dims.world_size, dims.pp, dims.dp))


def beyond_plain(spec: ModelSpec, topology: Topology, tried: Sequence[ParallelDims]) -> list[Layout]:
    """What else to search: formats on every split, experts kept whole."""
    names = _SEARCHED if len(topology.devices) <= 64 else _SEARCHED_WIDELY
    formats = [FORMATS[name] for name in names if _worth(FORMATS[name], topology)]
    found = [Layout(dims, kept) for dims in tried for kept in formats]
    if spec.experts is not None:
        for dims in tried:
            for ep in sorted(ep for ep in {dims.tp, dims.tp * dims.dp} if 1 < ep <= MOST_EP):
                split = ParallelDims(dims.tp, dims.pp, dims.dp, ep)
                found += [Layout(split, kept) for kept in (PLAIN, *formats)]
    return found


def offloaded(rejected: Sequence[Candidate]) -> list[Layout]:
    """Of what does not fit, one device and one replica over all of them, with the rest in host memory."""
    whole = [c for c in rejected if c.dims.dp == 1 and c.dims.ep == 1 and c.shards]
    most = max((c.dims.world_size for c in whole), default=1)
    return [Layout(c.dims, c.format, offload=True) for c in whole if c.dims.world_size in (1, most)]


def _beyond_memory(
    spec: ModelSpec,
    topology: Topology,
    judged: Sequence[Judged],
    judge: Callable[[Layout, bool], Judged],
) -> tuple[list[Judged], tuple[str, ...]]:
    """Where nothing fits the devices in the model's own precision: with host memory, which leaves answers as they are;
    where that is short too, in fewer bits. And why."""
    if topology.devices[0].pool:  # whose memory is the host's
        return list(judged), ()
    own = native(spec).name
    tried = [
        judge(layout, layout.format.name == own)
        for layout in offloaded([c for c, _ in judged if not c.feasible])
    ]
    every = [*judged, *tried]
    if any(c.feasible and c.not_runnable is None for c, _ in tried):
        return every, (
            f"Nothing of {spec.name} in its own precision fits {topology.name}: what does not stays in host memory, "
            "which leaves its answers as they are.",
        )
    # A cache in float8 is one change more, for little: left to who names it.
    named = [(c if c.format.has_float8_kv else _as_named(spec, topology, c), p) for c, p in every]
    if not any(c.feasible and c.not_runnable is None for c, _ in named):
        return every, ()
    return named, (
        f"Nothing of {spec.name} in its own precision fits {topology.name}, its host memory counted in: the best of "
        "fewer bits, with and without host memory, changes its answers.",
    )


def _as_named(spec: ModelSpec, topology: Topology, candidate: Candidate) -> Candidate:
    return replace(candidate, not_runnable=why_not(spec, candidate.layout))


def _worth(kept: Format, topology: Topology) -> bool:
    """Formats whose products a device cannot do in fewer bits gain nothing over int4, but memory by half."""
    if topology.devices[0].kind == "cpu" or lacking(kept, topology.devices) is not None:
        return False
    return kept.compute is None or all(kept.compute in device.flops_per_s for device in topology.devices)


def _judge(
    spec: ModelSpec,
    layout: Layout,
    topology: Topology,
    workload: Workload,
    dtype: str,
    max_model_len: int | None,
    engine: Engine | None,
    cut_for: Workload,
    kept: Sequence[Kept],
    room: Room,
    *,
    named: bool,
) -> Judged:
    """One layout: rejected with the reason, or estimated. No placement where it cannot be split so."""
    bare = Candidate(
        layout.dims,
        None,
        None,
        format=layout.format,
        offload=layout.offload,
        zero3=layout.zero3,
        not_runnable=why_not(spec, layout, named=named),
    )
    if not layout.zero3 and is_known(spec) and (lacks := lacking(layout.format, topology.devices)):
        return replace(bare, reason=lacks), None
    try:
        placement = place(spec, layout, dtype, topology, engine, cut_for, room)
    except BadLayout as error:
        return replace(bare, reason=str(error)), None
    put = replace(bare, shards=placement.shards, devices=placement.devices)
    reason = rejection(placement, workload, max_model_len) or short_host(placement, workload)
    if reason is not None:
        return replace(put, reason=reason), placement
    made = informed(estimate(placement, workload), layout.name, workload, kept)
    made = replace(made, spread=spread(placement, made))
    return replace(put, estimate=made, marked=tuple(_notes(placement, made, workload))), placement


def _rank(candidate: Candidate, workload: Workload) -> tuple[float, float, int, int, int]:
    """What keeps the limits first; ties go to fewer devices, then to the layout with fewer parts that talk."""
    made, dims = candidate.estimate, candidate.dims
    assert made is not None
    over = max(
        made.ttft_s / workload.most_ttft_s if workload.most_ttft_s else 0.0,
        made.tpot_s / workload.most_tpot_s if workload.most_tpot_s else 0.0,
        1.0,
    )
    return over, score(made, dims, workload), dims.world_size, dims.pp, dims.tp


def over_limits(made: Estimate | None, workload: Workload) -> list[str]:
    """What an estimate misses of the workload's limits, in words; nothing where it keeps them."""
    if made is None:
        return []
    told = []
    for name, value, limit in (
        ("first token", made.ttft_s, workload.most_ttft_s),
        ("each next one", made.tpot_s, workload.most_tpot_s),
    ):
        if limit is not None and value > limit:
            told.append(f"{name} after {ms(value)}, the limit is {ms(limit)}")
    return told


def _notes(placement: Placement, made: Estimate, workload: Workload) -> Iterator[str]:
    spec, dims = placement.spec, placement.dims
    if placement.zero3 or not is_known(spec):
        yield "under the compatibility runtime: slower than this"
    if spec.latent is None and dims.tp > spec.kv_heads:
        yield f"{spec.kv_heads} KV heads on {dims.tp} ranks: replicated"
    elif spec.latent is None and spec.kv_heads % dims.tp:
        most = max(len(shard.kv_heads) for shard in placement.shards)
        yield f"{spec.kv_heads} KV heads over {dims.tp} ranks: the fullest holds {most}"
    length = workload.prompt_tokens + workload.output_tokens
    at_once = min(made.kv_tokens // length, placement.engine.max_sequences) * dims.dp
    if at_once < workload.concurrency:
        yield f"room for {at_once} of {workload.concurrency} requests at once; the rest wait"
    if made.source != MODEL:
        yield made.source
    yield from over_limits(made, workload)
    if placement.offload:
        yield _residence(placement, workload)


def _residence(placement: Placement, workload: Workload) -> str:
    """Of the rank that streams most, and what nobody knows of its host."""
    needs = memories(placement, workload)
    need = max(needs[: placement.dims.replica_size], key=lambda one: one.streamed)
    if not need.streamed:
        return "all of a rank's layers resident: nothing is streamed"
    assert need.streaming is not None, "what is streamed has a schedule"
    where = "the disk" if placement.room.on_disk else "host memory"
    told = (
        f"{need.streaming.resident} of a rank's {need.streaming.layers} layers resident; "
        f"{need.streamed / 1e9:.1f} GB come from {where} at every step"
    )
    unknown = unknown_host(placement, needs)
    return told if unknown is None else f"{told}; {unknown}"
