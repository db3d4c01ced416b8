"""Predictions for this machine, with what was measured of it in place of data sheets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cluster import measure
from cluster.discover import discover
from cluster.errors import NoFeasiblePlan
from cluster.topology import Topology
from launch.options import EngineOptions
from launch.progress import Progress
from launch.prompts import Prompt
from strategies.plan import Candidate, ParallelDims, Plan
from strategies.planner import plan
from strategies.spec import Objective, Workload


def this_machine(options: EngineOptions, progress: Progress, *, measuring: bool) -> Topology:
    """Its devices and links; measured now or on an earlier day. `measuring` False: only if it was earlier."""
    found = discover(
        device=options.device, peer_access=options.peer_access, visible=os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    kept = cache_directory()
    if measuring:
        profile = measure.measure(found, kept, progress.say)
    else:
        fingerprint = measure.fingerprint_of(found)
        earlier = measure.load(measure.profile_path(kept, fingerprint), fingerprint)
        if earlier is None:
            return found
        profile = earlier
    return measure.apply(profile, found, options.dtype)


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shardwise"


def predict(
    options: EngineOptions, topology: Topology, workload: Workload, layouts: Sequence[ParallelDims] | None
) -> Plan:
    length = options.max_model_len
    return plan(options.spec, topology, workload, options.dtype, layouts=layouts, max_model_len=length)


def choose(options: EngineOptions, prompts: Sequence[Prompt], progress: Progress) -> Candidate:
    """The planner's layout for these prompts: for one, by latency; else by throughput. Raises NoFeasiblePlan."""
    topology = this_machine(options, progress, measuring=False)
    longest = max(len(p.token_ids) for p in prompts)
    output = max(p.sampling.max_tokens for p in prompts)
    output = max(1, min(output, options.spec.max_positions - longest))
    objective = Objective.LATENCY if len(prompts) == 1 else Objective.THROUGHPUT
    made = predict(options, topology, Workload(longest, output, len(prompts), objective), None)
    if made.chosen is None:
        raise NoFeasiblePlan(" ".join(made.explanation))
    return made.chosen
