"""What today's cost model says of runs that `compare` kept: `python -m tests.bench.repredict PROFILE.json FOLDER …`.

A comparison's journal has what was measured, the machine's profile (`profile --out`) what predictions are made of; both
stay true when the model changes. Prints each run's errors, then the means, medians and regrets over all of them; with
--write, leaves the folder's report anew. --overlap-tokens: as the engine was that ran, where it has changed since.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import msgspec

from cluster.profile import MachineProfile, apply, read
from launch.compare_journal import NAME, Head, open_journal
from launch.memory import capped
from launch.report import Comparison, comparison_to_json, rows, verdicts
from launch.report_folder import write
from strategies.engines import OURS, engine, with_limits
from strategies.plan import Layout
from strategies.planner import plan
from strategies.read_spec import builtin
from strategies.spec import Workload

METRICS = {"TTFT": "ttft_ms", "TPOT": "tpot_ms", "tokens/s": "output_tokens_per_s"}


def again(folder: Path, profile: MachineProfile, overlap_tokens: int | None) -> Comparison:
    with (folder / NAME).open("rb") as file:
        facts = msgspec.json.decode(file.readline(), type=Head).facts
    journal = open_journal(folder, facts, fresh=False)
    concurrencies = sorted({n for trials in journal.layouts.values() for n in trials})
    lengths = int(facts["prompt tokens"]), int(facts["output tokens"])
    loads = [Workload(*lengths, concurrency=n) for n in concurrencies]
    spec = next(
        found for name in (facts["model"], folder.name.rpartition("-")[0]) if (found := builtin(name))
    )
    by = with_limits(
        engine(OURS),
        chunk_tokens=int(facts["--max-num-batched-tokens"]),
        max_sequences=int(facts["--max-num-seqs"]),
    )
    if overlap_tokens is not None:
        by = replace(by, overlap_tokens=overlap_tokens)
    dtype = facts["dtype"]
    cap, share = facts["--device-memory-gb"], float(facts["--gpu-memory-utilization"])
    topology = capped(
        apply(profile, profile.topology, dtype), None if cap == "None" else float(cap), share=share
    )
    plans = {
        load.concurrency: plan(
            spec,
            topology,
            load,
            dtype,
            layouts=[Layout.parse(name) for name in journal.layouts],
            max_model_len=sum(lengths),
            engine=by,
            cut_for=loads[-1],
        )
        for load in loads
    }
    return Comparison(plans, journal.layouts, loads[0], topology, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--overlap-tokens", type=int)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    profile = read(args.profile)
    assert profile is not None, f"{args.profile} is no profile of this version"
    errors: dict[str, list[float]] = {name: [] for name in METRICS}
    regrets: list[float] = []
    print(
        "| run | layout | at once | TTFT ms | measured | % | TPOT ms | measured | % | tokens/s | measured | % |"
    )
    print("|---|---|" + "--:|" * 10)
    for folder in args.folders:
        made = again(folder, profile, args.overlap_tokens)
        for row in rows(msgspec.json.decode(msgspec.json.encode(comparison_to_json(made)))):
            cells = [folder.name, row["layout"], row["concurrency"]]
            for name, metric in METRICS.items():
                error = row[f"{metric}_error_percent"]
                if isinstance(error, float):
                    errors[name].append(error)
                    cells += [f"{row[f'{metric}_{what}']:,.5g}" for what in ("predicted", "measured")]
                    cells.append(f"{error:+.1f}")
            print("| " + " | ".join(map(str, cells)) + " |")
        regrets += [float(str(v["regret_percent"])) for v in verdicts(made) if len(made.trials) > 1]
        if args.write:
            print(*write(folder, made), sep="\n")
    print()
    for name, found in errors.items():
        sizes = [abs(error) for error in found]
        mean, middle = statistics.fmean(sizes), statistics.median(sizes)
        print(f"{name}: {len(sizes)} runs, MAPE {mean:.1f} %, median {middle:.1f} %, most {max(sizes):.1f} %")
    mean, most = statistics.fmean(regrets or [0]), max(regrets or [0])
    print(f"regret: {len(regrets)} choices, mean {mean:.2f} %, most {most:.2f} %")


if __name__ == "__main__":
    main()
