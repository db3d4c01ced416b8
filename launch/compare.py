"""`shardwise compare`: predict, measure and check every layout on this machine, and print the signed error."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from launch.options import add_engine_arguments
from launch.plan import add_workload_arguments, check_lengths, layouts_of, workload_of

if TYPE_CHECKING:
    from cluster.topology import Topology
    from launch.options import EngineOptions
    from launch.progress import Progress
    from launch.trial import Trial
    from strategies.plan import Layout, Plan
    from strategies.spec import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layouts",
        metavar="A,B",
        help="only these, such as tp2,pp2; default: all that this machine could hold",
    )
    parser.add_argument("--no-measure", action="store_true", help="predict alone, start nothing")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, nothing else"
    )
    add_workload_arguments(parser)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from cluster.errors import NoFeasiblePlan
    from launch.options import check_blocks, engine_options
    from launch.predict import measured_machine, predict, this_machine
    from launch.progress import Progress
    from launch.report import comparison_to_json, show_comparison

    workload = workload_of(args)
    layouts = layouts_of(args.layouts)
    options = engine_options(args, needs_weights=not args.no_measure)
    check_lengths(options.spec, workload, options.max_model_len)
    options = replace(
        options, max_model_len=options.max_model_len or workload.prompt_tokens + workload.output_tokens
    )
    check_blocks(options)
    progress = Progress()
    topology = this_machine(options) if args.no_measure else measured_machine(options, progress)
    plan = predict(options, topology, workload, layouts)
    trials = {} if args.no_measure else _try_all(plan, options, workload, topology, progress)
    if args.json:
        print(json.dumps(comparison_to_json(plan, trials, workload, topology), indent=2))
    else:
        show_comparison(plan, trials, workload, topology, options.dtype)
    return 0 if plan.chosen is not None else NoFeasiblePlan.exit_code


def _try_all(
    plan: Plan, options: EngineOptions, workload: Workload, topology: Topology, progress: Progress
) -> dict[Layout, Trial]:
    """Every feasible layout, smallest first, on one cluster: the first of them is what the others must equal."""
    from launch.start import cluster
    from launch.trial import Truth, measure_truth, run_trial

    feasible = [c for c in plan.candidates if c.feasible and c.not_runnable is None]
    if not feasible:
        return {}
    feasible.sort(key=lambda c: (bool(c.format.name), c.dims.world_size, c.dims.dp, c.dims.pp))
    trials: dict[Layout, Trial] = {}
    with cluster(options, max(c.dims.world_size for c in feasible), progress) as found:
        truth: Truth | None = measure_truth(
            found, options, [c.dims for c in feasible if c.layout.is_plain], topology, progress
        )
        for candidate in feasible:
            own = replace(options, format=candidate.format.name)
            trials[candidate.layout] = run_trial(found, candidate, own, workload, topology, truth, progress)
    return trials
