"""Enumerate, reject with the arithmetic, estimate, rank, explain."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from cluster.errors import BadLayout
from cluster.topology import Topology
from strategies.cost import estimate, score
from strategies.explain import explain
from strategies.place import place, rejection
from strategies.plan import Candidate, Estimate, ParallelDims, Placement, Plan
from strategies.spec import ModelSpec, Workload
from strategies.ways_out import ways_out


def plan(
    spec: ModelSpec,
    topology: Topology,
    workload: Workload,
    dtype: str,
    *,
    layouts: Sequence[ParallelDims] | None = None,
    max_model_len: int | None = None,
) -> Plan:
    """The best layout for the workload's objective among `layouts`, or among all that the machine could hold.

    Every candidate is kept: the feasible ones from best to worst, then the others with their reasons.
    `max_model_len` is the longest sequence to make room for; by default the workload's own.
    """
    tried = enumerate_layouts(len(topology.devices)) if layouts is None else layouts
    judged = [_judge(spec, dims, topology, workload, dtype, max_model_len) for dims in tried]
    feasible = [(c, p) for c, p in judged if p is not None and c.feasible]
    feasible.sort(key=lambda pair: _rank(pair[0], workload))
    if feasible:
        sentences = explain(feasible, workload)
    else:
        sentences = _instead(spec, topology, workload, dtype, layouts, max_model_len)
    candidates = (*(c for c, _ in feasible), *(c for c, _ in judged if not c.feasible))
    return Plan(spec.name, topology.name, candidates, candidates[0] if feasible else None, sentences)


def _instead(
    spec: ModelSpec,
    topology: Topology,
    workload: Workload,
    dtype: str,
    layouts: Sequence[ParallelDims] | None,
    max_model_len: int | None,
) -> tuple[str, ...]:
    """What to do where nothing that was tried fits: take what was not asked for, or change what there is."""
    if layouts is not None:
        best = plan(spec, topology, workload, dtype, max_model_len=max_model_len).chosen
        if best is not None:
            return (f"{best.dims.name} fits {topology.name}, and would be chosen.",)
    length = max_model_len or workload.prompt_tokens + workload.output_tokens
    return ways_out(spec, topology, dtype, length)


def enumerate_layouts(devices: int) -> list[ParallelDims]:
    """Every tp × pp × dp that so many devices can hold, small ones first: some may be better left out.

    Over eight devices each size is a power of two or divides their number, lest there be hundreds.
    """
    sizes = [n for n in range(1, devices + 1) if devices <= 8 or devices % n == 0 or n & (n - 1) == 0]
    every = [
        ParallelDims(tp, pp, dp)
        for tp, pp, dp in itertools.product(sizes, repeat=3)
        if tp * pp * dp <= devices
    ]
    return sorted(every, key=lambda dims: (dims.world_size, dims.pp, dims.dp))


def _judge(
    spec: ModelSpec,
    dims: ParallelDims,
    topology: Topology,
    workload: Workload,
    dtype: str,
    max_model_len: int | None,
) -> tuple[Candidate, Placement | None]:
    """One layout: rejected with the reason, or estimated. No placement where it cannot be split so."""
    try:
        placement = place(spec, dims, dtype, topology)
    except BadLayout as error:
        return Candidate(dims, reason=str(error), estimate=None), None
    reason = rejection(placement, workload, max_model_len)
    if reason is not None:
        return Candidate(dims, reason, None, placement.shards, (), placement.devices), placement
    made = estimate(placement, workload)
    notes = _notes(placement, made, workload)
    return Candidate(dims, None, made, placement.shards, notes, placement.devices), placement


def _rank(candidate: Candidate, workload: Workload) -> tuple[float, int, int, int]:
    """Ties go to fewer devices, then to the layout with fewer parts that talk."""
    assert candidate.estimate is not None
    dims = candidate.dims
    return score(candidate.estimate, dims, workload), dims.world_size, dims.pp, dims.tp


def _notes(placement: Placement, made: Estimate, workload: Workload) -> tuple[str, ...]:
    notes = []
    spec, dims = placement.spec, placement.dims
    if dims.tp > spec.kv_heads:
        notes.append(f"{spec.kv_heads} KV heads on {dims.tp} ranks: replicated")
    elif spec.kv_heads % dims.tp:
        most = max(len(shard.kv_heads) for shard in placement.shards)
        notes.append(f"{spec.kv_heads} KV heads over {dims.tp} ranks: the fullest holds {most}")
    length = workload.prompt_tokens + workload.output_tokens
    at_once = min(made.kv_tokens // length, placement.engine.max_sequences) * dims.dp
    if at_once < workload.concurrency:
        notes.append(f"room for {at_once} of {workload.concurrency} requests at once; the rest wait")
    return tuple(notes)
