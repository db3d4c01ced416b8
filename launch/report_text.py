"""A comparison for people, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from launch.compare_layouts import refused
from launch.compare_quality import told
from launch.plan import WIDTH, bullets, heading, plan_table, rejections
from launch.report import Comparison, error_percent, outputs, verdicts
from launch.trial import Measured, Trial
from strategies.explain import ms
from strategies.plan import Candidate, Estimate

if TYPE_CHECKING:
    from rich.table import Table


def show_comparison(made: Comparison) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    for n, plan in made.plans.items():
        console.print(heading(plan, made.topology, made.load(n), made.dtype), "", sep="\n")
        if made.trials:
            console.print(comparison_table(made, n), "", sep="\n")
        elif plan.chosen is not None:
            console.print(plan_table(plan))
    for part in rejections(made.plan, every=made.named):
        console.print(part)
    if made.plan.chosen is None:
        console.print(bullets(made.plan.explanation))
    for line in (
        *_residences(made),
        *sentences(verdicts(made)),
        *_qualities(made),
        *_health(made),
        *_failures(made),
    ):
        console.print(line)


def comparison_table(made: Comparison, concurrency: int) -> Table:
    """Predicted, measured and signed error of each feasible layout, best prediction first."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)  # 80 columns, with room for long names
    table.add_column("\nlayout", no_wrap=True)
    for metric in ("TTFT ms", "TPOT ms", "tok/s"):
        for column in (f"{metric}\npred.", "\nmeas.", "\nerror"):
            table.add_column(column, justify="right", no_wrap=True)
    table.add_column("\noutputs", no_wrap=True)
    plan = made.plans[concurrency]
    for candidate in plan.candidates:
        if candidate.estimate is not None and candidate.not_runnable is None:
            name = candidate.layout.name
            trial = made.trial(name, concurrency)
            cells = _cells(candidate.estimate, None if trial is None else trial.measured)
            style = "bold" if candidate is plan.chosen else None
            told = _outputs(made, candidate) if trial is not None else ""
            table.add_row(name, *cells, told, style=style)
    if made.named:  # their arithmetic is below
        for name, _ in refused(plan):
            table.add_row(name, "refused")
    for url, trials in made.against.items():
        if concurrency in trials:
            table.add_row(_host(url), *_cells(None, trials[concurrency].measured), "")
    return table


def _outputs(made: Comparison, candidate: Candidate) -> str:
    """Beside the others of a format; else how much perplexity rises, for which no other layout stands."""
    said = outputs(made, candidate.layout.name) or ""
    if not candidate.format.name or said == "different":
        return said
    found = made.quality.get(candidate.format.name)
    return "ppl ?" if found is None else f"ppl {found.perplexity_rise_percent:+.1f}%"


def _residences(made: Comparison) -> Iterator[str]:
    """Of offloaded layouts, as they are run: with room for the heaviest load."""
    for c in made.plans[max(made.plans)].candidates:
        if c.offload and c.marked and c.not_runnable is None:
            yield f"{c.layout.name}: {c.marked[-1]}"


def _qualities(made: Comparison) -> Iterator[str]:
    """What formats do to answers, or why that is not told."""
    runs = [c for c in made.plan.candidates if c.format.name and c.feasible and c.not_runnable is None]
    formats = dict.fromkeys(c.format.name for c in runs)
    for name, found in made.quality.items():
        yield f"+{name}: {told(found)}"
    missing = [f"+{name}" for name in formats if name not in made.quality]
    if missing:
        why = made.quality_unknown or "it was not measured"
        yield f"What {' and '.join(missing)} {'does' if len(missing) == 1 else 'do'} to answers cannot be told: {why}."


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


def _cells(predicted: Estimate | None, measured: Measured | None) -> list[str]:
    def number(value: float, is_time: bool) -> str:
        return ms(value).removesuffix(" ms") if is_time else f"{value:,.{1 if value < 100 else 0}f}"

    cells: list[str] = []
    for name, is_time in (("ttft_s", True), ("tpot_s", True), ("output_tokens_per_s", False)):
        value = None if predicted is None else getattr(predicted, name)
        cells.append("" if value is None else number(value, is_time))
        if measured is None:
            cells += ["", ""]
            continue
        real = getattr(measured, name)
        error = None if value is None else error_percent(value, real)
        cells += [number(real, is_time), "" if error is None else f"{error:+.0f}%"]
    return cells


def sentences(found: Sequence[Mapping[str, object]]) -> Iterator[str]:
    several = len({verdict["concurrency"] for verdict in found}) > 1
    for verdict in found:
        objective, chosen, winner = verdict["objective"], verdict["chosen"], verdict["winner"]
        where = f" at {verdict['concurrency']} at once" if several else ""
        missing = verdict["not_measured"]
        but = f" ({', '.join(missing)} not measured)" if isinstance(missing, list) and missing else ""
        if chosen == winner:
            yield f"For {objective}{where} the plan chose {chosen}, and {chosen} was best{but}."
        else:
            loss = f"by {verdict['regret_percent']:.1f}%"
            yield f"For {objective}{where} the plan chose {chosen}; {winner} was best, {loss}{but}."


def _health(made: Comparison) -> Iterator[str]:
    for name, trials in made.trials.items():
        for n, trial in sorted(trials.items()):
            if trial.health:
                yield f"{name}, {n} at once: {_of_gpus(trial)}"


def _of_gpus(trial: Trial) -> str:
    gpus = []
    for h in trial.health:
        facts = ((h.sm_clock_mhz, "MHz"), (h.temperature_c, "°C"), (h.watts, "W"))
        gpus.append(" ".join(f"{value:.0f} {unit}" for value, unit in facts if value is not None))
    told = "; ".join(gpus)
    if trial.joules_per_token is not None:
        told += f"; {trial.joules_per_token:.2f} J a token"
    if trial.throttled_by:
        told += f"; THROTTLED by {', '.join(trial.throttled_by)}"
    return told


def _failures(made: Comparison) -> Iterator[str]:
    for name, trials in (*made.trials.items(), *made.against.items()):
        for failure in dict.fromkeys(t.failure for t in trials.values() if t.failure is not None):
            yield f"{name} could not be run: {failure}"
