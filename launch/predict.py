"""Predictions for this machine, with what was measured of it in place of data sheets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cluster.discover import discover
from cluster.errors import BadLayout, NoFeasiblePlan
from cluster.measure import measure
from cluster.profile import apply, kept
from cluster.topology import Topology
from launch.options import EngineOptions
from launch.progress import Progress
from launch.prompts import Prompt
from strategies.engines import CPU, OURS, engine, with_limits
from strategies.pipeline import shard_replica
from strategies.plan import Candidate, ParallelDims, Plan
from strategies.planner import plan
from strategies.spec import Objective, Workload


def this_machine(options: EngineOptions, cpu_ranks: int | None = None) -> Topology:
    """Its devices and links, as measured on an earlier day if they were. `cpu_ranks`: one a core by default."""
    found = _found(options, cpu_ranks)
    earlier = kept(cache_directory(), found)
    return found if earlier is None else apply(earlier, found, options.dtype)


def measured_machine(options: EngineOptions, progress: Progress) -> Topology:
    """The same, measured now if it never was."""
    found = _found(options)
    return apply(measure(found, cache_directory(), progress.say), found, options.dtype)


def _found(options: EngineOptions, cpu_ranks: int | None = None) -> Topology:
    return discover(
        cpu_ranks if options.device == "cpu" else None,
        options.device,
        peer_access=options.peer_access,
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardwise"


def predict(
    options: EngineOptions, topology: Topology, workload: Workload, layouts: Sequence[ParallelDims] | None
) -> Plan:
    ours = with_limits(
        engine(CPU if options.device == "cpu" else OURS),
        chunk_tokens=options.max_num_batched_tokens,
        max_sequences=options.max_num_seqs,
    )
    length = options.max_model_len
    return plan(
        options.spec, topology, workload, options.dtype, layouts=layouts, max_model_len=length, engine=ours
    )


def choose(options: EngineOptions, prompts: Sequence[Prompt]) -> Candidate:
    """The planner's layout for these prompts: for one, by latency; else by throughput. Raises NoFeasiblePlan."""
    made = predict(options, this_machine(options), _workload(options, prompts), None)
    if made.chosen is None:
        raise NoFeasiblePlan(" ".join(made.explanation))
    return made.chosen


def fitted(options: EngineOptions, prompts: Sequence[Prompt], dims: ParallelDims) -> Candidate:
    """The layout asked for, if model and machine can be split so. Raises BadLayout with the arithmetic."""
    if options.address is not None:  # other machines, whose memory is seen once they are joined
        return Candidate(dims, None, None, shard_replica(options.spec, dims))
    topology = this_machine(options, cpu_ranks=dims.world_size)
    made = predict(options, topology, _workload(options, prompts), [dims])
    if made.chosen is None:
        reason = made.candidates[0].reason
        raise BadLayout(f"{dims.name} does not fit: {reason}. {' '.join(made.explanation)}")
    return made.chosen


def _workload(options: EngineOptions, prompts: Sequence[Prompt]) -> Workload:
    longest = max(len(p.token_ids) for p in prompts)
    output = max(p.sampling.max_tokens for p in prompts)
    output = max(1, min(output, options.spec.max_positions - longest))
    objective = Objective.LATENCY if len(prompts) == 1 else Objective.THROUGHPUT
    return Workload(longest, output, len(prompts), objective)
