"""Predictions for this machine, with what was measured of it in place of data sheets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.busy import with_what_is_left
from cluster.errors import BadLayout, NoFeasiblePlan
from cluster.measure import measure
from cluster.profile import apply
from cluster.topology import Topology
from launch.configured import priced_engine, room_of
from launch.disk_limit import tell_disk
from launch.kept import Shelf, shelf
from launch.machine import as_measured, cache_directory, found_here
from launch.memory import capped
from launch.nodes import free_machine
from launch.options import EngineOptions
from launch.progress import Progress
from launch.prompts import Prompt
from strategies.formats import FORMATS
from strategies.kept import Kept
from strategies.pipeline import shard_replica
from strategies.plan import Candidate, Layout, ParallelDims, Plan
from strategies.planner import plan
from strategies.runnable import lacking
from strategies.spec import Objective, Workload


def this_machine(options: EngineOptions, cpu_ranks: int | None = None) -> Topology:
    """Its devices and links, as measured on an earlier day if they were. `cpu_ranks`: one a core by default."""
    return _capped(as_measured(_found(options, cpu_ranks), options.dtype), options)


def measured_machine(options: EngineOptions, progress: Progress) -> Topology:
    """The same, measured now if it never was."""
    found = _found(options)
    now = with_what_is_left(apply(measure(found, cache_directory(), progress.say), found, options.dtype))
    if now.devices[0].free_share < 1:
        progress.say(
            f"other programs leave {now.devices[0].free_share:.0%} of the cores' time: predictions are for that much"
        )
    return _capped(now, options)


def _capped(topology: Topology, options: EngineOptions) -> Topology:
    share = options.gpu_memory_utilization
    return capped(topology, options.device_memory_gb, options.host_memory_gb, share=share)


def _found(options: EngineOptions, cpu_ranks: int | None = None) -> Topology:
    ranks = cpu_ranks if options.device == "cpu" else None
    return found_here(options.device, cpu_ranks=ranks, peer_access=options.peer_access)


def predict(
    options: EngineOptions,
    topology: Topology,
    workload: Workload,
    layouts: Sequence[Layout] | None,
    cut_for: Workload | None = None,
    kept: Sequence[Kept] = (),
    wide: bool = False,
) -> Plan:
    """Offloaded layouts are reckoned with the room that the engine leaves: for what it is told, or for `cut_for`."""
    return plan(
        options.spec,
        topology,
        workload,
        options.dtype,
        layouts=layouts,
        max_model_len=options.max_model_len,
        wide=wide,
        engine=priced_engine(options),
        cut_for=cut_for,
        kept=kept,
        room=room_of(options, None if cut_for is None else 0),
    )


def shelf_of(options: EngineOptions, topology: Topology) -> Shelf:
    """Where what was measured of this model and machine is kept."""
    return shelf(
        cache_directory(),
        topology,
        options.spec,
        options.dtype,
        chunk_tokens=options.max_num_batched_tokens,
        max_sequences=options.max_num_seqs,
    )


@dataclass(frozen=True, slots=True)
class Planned:
    """The layout to run, and why: without a plan where it was asked for and the machines are elsewhere."""

    candidate: Candidate
    plan: Plan | None
    topology: Topology | None


def planned(
    options: EngineOptions, workload: Workload, dims: ParallelDims | None, progress: Progress
) -> Planned:
    """The layout asked for, or the planner's choice. Raises NoFeasiblePlan, or BadLayout with the arithmetic."""
    if dims is not None and options.address is not None:  # memory is seen once the machines are joined
        return Planned(_unseen(options, dims), None, None)
    if options.address is not None:
        topology = _capped(free_machine(options.address, options.device, progress), options)
    else:
        topology = this_machine(options, cpu_ranks=None if dims is None else dims.world_size)
    layouts = (
        None if dims is None else [Layout(dims, FORMATS[options.format], options.offload, options.zero3)]
    )
    kept = shelf_of(options, topology).read()
    made = predict(options, topology, workload, layouts, kept=kept)
    if made.chosen is None:
        why = " ".join(made.explanation)
        raise NoFeasiblePlan(why) if dims is None else BadLayout(_refused(made.candidates[0], topology, why))
    fits = made.chosen
    if dims is None:
        progress.say(f"layout {made.chosen.layout.name}, the planner's choice; `shardwise plan` says why")
    if options.offload_dir is not None and options.address is None:  # elsewhere, those who read from it tell
        rate = tell_disk(options, made.chosen, topology, workload, progress)
        made = predict(replace(options, disk_bytes_per_s=rate), topology, workload, layouts, kept=kept)
    return Planned(made.chosen or fits, made, topology)


def _unseen(options: EngineOptions, dims: ParallelDims) -> Candidate:
    """A layout on machines that nothing is known of yet."""
    kept = FORMATS[options.format]
    return Candidate(
        dims,
        None,
        None,
        shard_replica(options.spec, dims, kept=kept),
        format=kept,
        offload=options.offload,
        zero3=options.zero3,
    )


def _refused(asked: Candidate, topology: Topology, why: str) -> str:
    if asked.not_runnable is not None:
        return f"{asked.layout.name} does not run here: {asked.not_runnable}"
    does = "fit" if lacking(asked.format, topology.devices) is None else "run here"
    return f"{asked.layout.name} does not {does}: {asked.reason}. {why}"


def workload_of(options: EngineOptions, prompts: Sequence[Prompt]) -> Workload:
    """Of prompts that are here: one's objective is latency, several have throughput."""
    longest = max(len(p.token_ids) for p in prompts)
    output = max(p.sampling.max_tokens for p in prompts)
    output = max(1, min(output, options.spec.max_positions - longest))
    objective = Objective.LATENCY if len(prompts) == 1 else Objective.THROUGHPUT
    return Workload(longest, output, len(prompts), objective)
