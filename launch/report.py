"""A comparison, for programs and for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.topology import Topology
from launch.plan import WIDTH, bullets, candidate_to_json, heading, plan_table, plan_to_json, rejections
from launch.trial import Measured, Trial
from strategies.cost import score
from strategies.explain import ms
from strategies.plan import Candidate, Estimate, Layout, Plan
from strategies.spec import Objective, Workload

if TYPE_CHECKING:
    from rich.table import Table

Trials = Mapping[Layout, Trial]


def error_percent(predicted: float, measured: float) -> float | None:
    """Signed; None where nothing was measured to divide by, as the TPOT of one-token answers."""
    return 100 * (predicted - measured) / measured if measured else None


def outputs(layout: Layout, trials: Trials) -> str | None:
    """equal or different, within one format; None where nothing could be compared."""
    trial = trials.get(layout)
    if trial is None or trial.measured is None:
        return None
    if trial.forced_error is not None and trial.allowed_error is not None:
        return "equal" if trial.forced_error <= trial.allowed_error else "different"
    alike = [t for of, t in trials.items() if of.format == layout.format and t.measured is not None]
    if layout.format.name and (len(alike) == 1 or any(t.forced_error is not None for t in trials.values())):
        return None  # nothing to compare with; or in half precision, where tokens may differ
    first = alike[0]
    return "equal" if trial.token_ids == first.token_ids else "different"


# --- for programs -------------------------------------------------------------------------------------------


def comparison_to_json(
    plan: Plan, trials: Trials, workload: Workload, topology: Topology
) -> dict[str, object]:
    """The object that `--json` prints: the plan's, and in each candidate what was measured."""
    made = plan_to_json(plan, workload)
    made["candidates"] = [_candidate(candidate, trials, workload) for candidate in plan.candidates]
    made["verdicts"] = verdicts(plan, trials, workload, topology)
    return made


def _candidate(candidate: Candidate, trials: Trials, workload: Workload) -> dict[str, object]:
    made = candidate_to_json(candidate)
    trial = trials.get(candidate.layout)
    made["results"] = [] if trial is None else [_result(made["predicted"], trial, workload)]
    made["outputs"] = outputs(candidate.layout, trials)
    return made


def _result(predicted: object, trial: Trial, workload: Workload) -> dict[str, object]:
    measured = {} if trial.measured is None else _measured(trial.measured)
    assert isinstance(predicted, Mapping), "only feasible layouts are tried"
    errors = {key: error_percent(predicted[key], value) for key, value in measured.items()}
    return {
        "concurrency": workload.concurrency,
        "predicted": predicted,
        "measured": measured or None,
        "error_percent": errors or None,
        "failure": trial.failure,
        "logits_error": trial.forced_error,
        "devices": [
            {
                "uuid": v.uuid,
                "sm_clock_mhz": v.sm_clock_mhz,
                "temperature_c": v.temperature_c,
                "watts": v.watts,
                "throttled_by": list(v.throttled_by),
            }
            for v in trial.vitals
        ],
    }


def _measured(found: Measured) -> dict[str, float]:
    return {
        "ttft_ms": round(found.ttft_s * 1e3, 4),
        "tpot_ms": round(found.tpot_s * 1e3, 4),
        "output_tokens_per_s": round(found.output_tokens_per_s, 4),
    }


def verdicts(plan: Plan, trials: Trials, workload: Workload, topology: Topology) -> list[dict[str, object]]:
    """For each objective: what the plan would choose, what was best, and what the choice loses to it."""
    return [
        verdict
        for o in Objective
        if (verdict := _verdict(plan, trials, replace(workload, objective=o), topology))
    ]


def _verdict(plan: Plan, trials: Trials, workload: Workload, topology: Topology) -> dict[str, object] | None:
    predicted, real = {}, {}
    for candidate in plan.candidates:
        trial = trials.get(candidate.layout)
        if candidate.estimate is not None and trial is not None and trial.measured is not None:
            predicted[candidate.layout] = score(candidate.estimate, candidate.dims, workload)
            as_measured = _as_estimate(trial.measured, candidate, topology)
            real[candidate.layout] = score(as_measured, candidate.dims, workload)
    if not real:
        return None
    chosen = min(predicted, key=lambda layout: (predicted[layout], layout.dims.world_size))
    winner = min(real, key=lambda layout: (real[layout], layout.dims.world_size))
    return {
        "concurrency": workload.concurrency,
        "objective": workload.objective.value,
        "chosen": chosen.name,
        "winner": winner.name,
        "regret_percent": round(100 * (real[chosen] / real[winner] - 1), 3),
    }


def _as_estimate(found: Measured, candidate: Candidate, topology: Topology) -> Estimate:
    """The estimate with what was measured in place of what was predicted."""
    assert candidate.estimate is not None
    rate = found.output_tokens_per_s
    usd = candidate.estimate.usd_per_million_tokens
    if usd is not None:
        usd *= candidate.estimate.output_tokens_per_s / rate
    return replace(
        candidate.estimate,
        ttft_s=found.ttft_s,
        tpot_s=found.tpot_s,
        output_tokens_per_s=rate,
        usd_per_million_tokens=usd,
    )


# --- for people ---------------------------------------------------------------------------------------------


def show_comparison(plan: Plan, trials: Trials, workload: Workload, topology: Topology, dtype: str) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    console.print(heading(plan, topology, workload, dtype), "", sep="\n")
    if trials:
        console.print(comparison_table(plan, trials), "", sep="\n")
    elif plan.chosen is not None:
        console.print(plan_table(plan))
    for part in rejections(plan):
        console.print(part)
    if plan.chosen is None:
        console.print(bullets(plan.explanation))
    for verdict in verdicts(plan, trials, workload, topology):
        console.print(_sentence(verdict))
    for line in _vitals(trials):
        console.print(line)
    for layout, trial in trials.items():
        if trial.failure is not None:
            console.print(f"{layout.name} could not be run: {trial.failure}")


def comparison_table(plan: Plan, trials: Trials) -> Table:
    """Predicted, measured and signed error of each feasible layout, best prediction first."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)  # 80 columns, with room for long names
    table.add_column("\nlayout", no_wrap=True)
    for metric in ("TTFT ms", "TPOT ms", "tok/s"):
        for column in (f"{metric}\npred.", "\nmeas.", "\nerror"):
            table.add_column(column, justify="right", no_wrap=True)
    table.add_column("\noutputs", no_wrap=True)
    for candidate in plan.candidates:
        if candidate.estimate is not None:
            trial = trials.get(candidate.layout)
            cells = _cells(candidate.estimate, None if trial is None else trial.measured)
            style = "bold" if candidate is plan.chosen else None
            table.add_row(candidate.layout.name, *cells, outputs(candidate.layout, trials) or "", style=style)
    return table


def _cells(predicted: Estimate, measured: Measured | None) -> list[str]:
    def number(value: float, is_time: bool) -> str:
        return ms(value).removesuffix(" ms") if is_time else f"{value:,.{1 if value < 100 else 0}f}"

    cells: list[str] = []
    for name, is_time in (("ttft_s", True), ("tpot_s", True), ("output_tokens_per_s", False)):
        value = getattr(predicted, name)
        cells.append(number(value, is_time))
        if measured is None:
            cells += ["", ""]
            continue
        real = getattr(measured, name)
        error = error_percent(value, real)
        cells += [number(real, is_time), "" if error is None else f"{error:+.0f}%"]
    return cells


def _sentence(verdict: Mapping[str, object]) -> str:
    objective, chosen, winner = verdict["objective"], verdict["chosen"], verdict["winner"]
    if chosen == winner:
        return f"For {objective} the plan chose {chosen}, and {chosen} was best."
    return f"For {objective} the plan chose {chosen}; {winner} was best, by {verdict['regret_percent']:.1f}%."


def _vitals(trials: Trials) -> Sequence[str]:
    lines = []
    for layout, trial in trials.items():
        for index, v in enumerate(trial.vitals):
            throttled = f", throttled by {', '.join(v.throttled_by)}" if v.throttled_by else ""
            lines.append(
                f"{layout.name}, GPU {index}: {v.sm_clock_mhz} MHz, {v.temperature_c} °C, {v.watts} W{throttled}"
            )
    return lines
