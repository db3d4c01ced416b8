"""`shardwise compare`: predict, measure and check every layout on this machine at several loads; print the error."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.options import add_engine_arguments
from launch.plan import add_workload_arguments, check_lengths, named_layouts, workload_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from launch.compare_journal import Journal
    from launch.options import EngineOptions
    from launch.progress import Progress
    from launch.report import Comparison
    from launch.trial import Trial
    from strategies.spec import Workload

DEFAULT_SWEEP = (1, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layouts",
        metavar="A,B",
        help="only these, such as tp2,pp2+int4,tp2+offload; default: all in the model's precision that this machine "
        "could hold, or, where none fits, the best in fewer bits and offloaded",
    )
    parser.add_argument("--no-measure", action="store_true", help="predict alone, start nothing")
    parser.add_argument(
        "--against",
        metavar="URL",
        action="append",
        default=[],
        help="put the OpenAI endpoint at this address beside them, under the same loads; may be given again",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for results and report; default: compare-MODEL-… here, one for each model, machine and workload",
    )
    parser.add_argument("--fresh", action="store_true", help="measure anew what the folder already has")
    parser.add_argument(
        "--skip-outputs",
        action="store_true",
        help="do not check half precision against float64: two starts less",
    )
    parser.add_argument(
        "--skip-quality",
        action="store_true",
        help="do not measure what formats in fewer bits do to answers: one process for each",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on standard output, nothing else"
    )
    add_workload_arguments(parser, sweep=DEFAULT_SWEEP)
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from launch.options import check_blocks, engine_options

    loads = [workload_of(argparse.Namespace(**{**vars(args), "concurrency": n})) for n in args.concurrency]
    workload = loads[0]
    layouts = named_layouts(args.layouts)
    options = engine_options(args, needs_weights=not args.no_measure)
    check_lengths(options.spec, workload, options.max_model_len)
    options = replace(
        options, max_model_len=options.max_model_len or workload.prompt_tokens + workload.output_tokens
    )
    check_blocks(options)
    from cluster.errors import NoFeasiblePlan, ShardwiseError
    from launch.compare_layouts import refused
    from launch.compare_quality import why_unknown
    from launch.compare_run import plans_of  # torch: after what can be refused without
    from launch.disk_limit import disk_rate
    from launch.predict import measured_machine, this_machine
    from launch.progress import Progress
    from launch.report import Comparison

    progress = Progress()
    topology = this_machine(options) if args.no_measure else measured_machine(options, progress)
    if options.offload_dir is not None:
        options = replace(options, disk_bytes_per_s=disk_rate(options))
    plans = plans_of(options, topology, loads, layouts)
    for name, why in refused(plans[workload.concurrency]) if layouts is not None else ():
        progress.say(f"{name} is left out: {why}")
    known = why_unknown(options, topology)
    every = plans[workload.concurrency].candidates
    named = layouts is not None or any(not c.layout.is_plain for c in every)
    comparison = Comparison(plans, {}, workload, topology, options.dtype, quality_unknown=known, named=named)
    if args.no_measure:
        _show(comparison, as_json=args.json)
    elif not _measure(args, comparison, options, loads, progress):
        return ShardwiseError.exit_code
    return 0 if plans[workload.concurrency].chosen is not None else NoFeasiblePlan.exit_code


def _measure(
    args: argparse.Namespace,
    comparison: Comparison,
    options: EngineOptions,
    loads: Sequence[Workload],
    progress: Progress,
) -> bool:
    """Whatever ends it, what is done by then is shown and written. → whether any of it ran, or nothing fits."""
    from launch import compare_against, compare_quality
    from launch.compare_journal import key_of, open_journal
    from launch.compare_run import Sweep, facts_of
    from launch.predict import shelf_of
    from launch.report import kept_of

    compare_against.check(args.against)
    workload, topology = comparison.workload, comparison.topology
    facts = facts_of(options, topology, workload)
    folder = args.out or Path(f"compare-{options.spec.name}-{key_of(facts)}")
    journal = open_journal(folder, facts, fresh=args.fresh)
    sweep = Sweep(options, topology, loads, comparison.plans, journal, progress, not args.skip_outputs)
    beside = [url for url in args.against if not all(journal.has(url, load.concurrency) for load in loads)]
    if journal.trials and not sweep.left() and not beside:
        progress.say(f"{folder} has all of this already; measuring it anew")
        journal = open_journal(folder, facts, fresh=True)
        sweep.journal = journal
    quality = {} if args.fresh else compare_quality.read(folder)
    try:
        sweep.run()
        for url in args.against:
            _measure_beside(url, loads, options, journal, progress)
        if comparison.quality_unknown is None and not args.skip_quality:
            formats = compare_quality.formats_of([c.format.name for c in sweep.candidates()], options)
            quality = compare_quality.measure(args.model, formats, options, folder, progress, quality)
    except KeyboardInterrupt:
        left = sum(len(loads) for _, loads in sweep.left())
        progress.say(f"interrupted with {left} runs to go; the same command goes on from here")
        raise
    finally:
        done = replace(comparison, trials=journal.layouts, against=journal.endpoints, quality=quality)
        if journal.trials:
            _show(done, as_json=args.json)
            _write(done, folder, progress)
            shelf_of(options, topology).add(list(kept_of(done)))
    if not journal.trials:
        _show(comparison, as_json=args.json)
    tried = [trial for trials in journal.layouts.values() for trial in trials.values()]
    return not tried or any(trial.measured is not None for trial in tried)


def _measure_beside(
    url: str, loads: Sequence[Workload], options: EngineOptions, journal: Journal, progress: Progress
) -> None:
    from launch import compare_against

    def on_trial(load: Workload, trial: Trial) -> None:
        journal.add(url, load.concurrency, trial)

    left = [load for load in loads if not journal.has(url, load.concurrency)]
    if left:
        compare_against.measure(url, left, options.spec.vocab, progress, on_trial)


def _show(comparison: Comparison, *, as_json: bool) -> None:
    from launch.report import comparison_to_json
    from launch.report_text import show_comparison

    if as_json:
        print(json.dumps(comparison_to_json(comparison), indent=2))
    else:
        show_comparison(comparison)


def _write(done: Comparison, folder: Path, progress: Progress) -> None:
    from launch.report_folder import write

    for line in write(folder, done):
        progress.say(line)
