"""Errors of predictions beside measured rows: overall, of rows left out of the fit, and by model, system and engine.

Pure, but for the page that `validate --report` writes.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from operator import itemgetter
from pathlib import Path

from cluster.errors import BadRequest
from launch.measured import Prediction, Row, beats_limit, is_held_out, number, spec_at

LOW_CONCURRENCY = 8  # rows up to here hold the load generator's queueing more than the engine's
Figures = dict[str, float | int | None]
Pairs = Sequence[tuple[Row, Prediction]]


@dataclass(frozen=True, slots=True)
class Error:
    """A measured figure beside its prediction."""

    row: Row
    metric: str
    measured: float
    predicted: float
    beyond: bool  # the row claims more than bandwidth and FLOP/s allow

    @property
    def signed(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def dense(self) -> bool:
        spec = spec_at(self.row["model_path"])
        return spec is None or spec.is_dense

    @property
    def low(self) -> bool:
        return (number(self.row["concurrency"]) or 0) <= LOW_CONCURRENCY


def errors_of(pairs: Iterable[tuple[Row, Prediction]]) -> list[Error]:
    found = []
    for row, made in pairs:
        for metric, column, predicted in made.figures(row):
            measured = number(row.get(column, ""))
            if measured is not None and measured > 0 and predicted is not None:
                found.append(Error(row, metric, measured, predicted, beats_limit(row, made)))
    return found


def summarise(kind: str, pairs: Pairs) -> dict[str, object]:
    """What `--json` prints: rows, refusals, and errors by class and by model, system and engine."""
    errors = errors_of(pairs)
    refused = [made.reason for _, made in pairs if made.reason]
    counted: dict[str, object] = {
        "kind": kind,
        "rows": len(pairs),
        "refused": len(refused),
        "refused_percent": round(100 * len(refused) / len(pairs), 2),
        "reasons": {reason: refused.count(reason) for reason in dict.fromkeys(refused)},
    }
    return {**counted, **(of_layouts(pairs, errors) if kind == "layouts" else of_serving(errors))}


def of_layouts(pairs: Pairs, errors: Sequence[Error]) -> dict[str, object]:
    right, ranked = pairs_ranked(pairs)
    return {
        "errors": {"all": figures(errors)},
        "pairs": {
            "ranked": ranked,
            "right": right,
            "right_percent": round(100 * right / ranked, 2) if ranked else None,
        },
        "by_gpu": _by(errors, itemgetter("gpu")),
        "by_engine": _by(errors, itemgetter("engine")),
    }


def of_serving(errors: Sequence[Error]) -> dict[str, object]:
    classes: Mapping[str, Callable[[Error], bool]] = {
        "tpot_dense": lambda e: e.metric == "tpot" and e.dense,
        "tpot_moe": lambda e: e.metric == "tpot" and not e.dense,
        f"ttft_dense_concurrency_to_{LOW_CONCURRENCY}": lambda e: e.metric == "ttft" and e.dense and e.low,
        f"ttft_moe_concurrency_to_{LOW_CONCURRENCY}": lambda e: e.metric == "ttft" and not e.dense and e.low,
        "ttft_all": lambda e: e.metric == "ttft",
    }
    parts: Mapping[str, Callable[[Error], bool]] = {
        "": lambda e: True,
        "_fitted": lambda e: not is_held_out(e.row),
        "_held_out": lambda e: is_held_out(e.row),
        "_within_limits": lambda e: not e.beyond,
    }
    by = {"model": "model_path", "system": "system", "engine": "backend"}
    return {
        "beyond_limit": len({id(e.row) for e in errors if e.beyond}),
        "errors": {
            f"{name}{part}": figures([e for e in errors if of(e) and within(e)])
            for part, within in parts.items()
            for name, of in classes.items()
        },
        **{
            f"by_{name}": {
                metric: _by([e for e in errors if e.metric == metric], itemgetter(column))
                for metric in ("tpot", "ttft")
            }
            for name, column in by.items()
        },
    }


def figures(errors: Sequence[Error]) -> Figures:
    size = [abs(e.signed) for e in errors]
    return {
        "rows": len(errors),
        "mape_percent": round(100 * statistics.fmean(size), 2) if size else None,
        "median_percent": round(100 * statistics.median(size), 2) if size else None,
        "bias_percent": round(100 * statistics.median(e.signed for e in errors), 2) if size else None,
    }


def _by(errors: Sequence[Error], key: Callable[[Row], str]) -> dict[str, Figures]:
    groups: dict[str, list[Error]] = {}
    for error in errors:
        groups.setdefault(key(error.row), []).append(error)
    return {name: figures(groups[name]) for name in sorted(groups)}


def pairs_ranked(pairs: Pairs) -> tuple[int, int]:
    """Pairs of one group that the predictions put in the measured order, and pairs there are.

    A pair with a row that was refused counts as wrong.
    """
    groups: dict[str, list[tuple[float, float | None]]] = {}
    for row, made in pairs:
        measured = number(row.get("value", ""))
        if row["group"] and measured is not None:
            groups.setdefault(row["group"], []).append((measured, made.value))
    right = ranked = 0
    for members in groups.values():
        for (measured_a, a), (measured_b, b) in combinations(members, 2):
            if measured_a == measured_b:
                continue
            ranked += 1
            right += a is not None and b is not None and (a - b) * (measured_a - measured_b) > 0
    return right, ranked


def tables(summary: Mapping[str, object]) -> list[tuple[str, Mapping[str, Figures]]]:
    """(title, rows) of every table in a summary."""
    found: list[tuple[str, Mapping[str, Figures]]] = []
    for key, value in summary.items():
        if not isinstance(value, dict) or not (key == "errors" or key.startswith("by_")):
            continue
        name = key.replace("_", " ")
        if "tpot" in value and "rows" not in value["tpot"]:
            found += [(f"{metric.upper()} {name}", value[metric]) for metric in ("tpot", "ttft")]
        else:
            found.append((name, value))
    return found


def sentences(summary: Mapping[str, object]) -> list[str]:
    """What stands above the tables."""
    said = [f"{summary['rows']} rows, {summary['refused']} refused ({summary['refused_percent']} %)."]
    reasons, ranked = summary["reasons"], summary.get("pairs")
    if isinstance(reasons, dict):
        said += [f"{times} × {reason}" for reason, times in reasons.items()]
    if isinstance(ranked, dict):
        said.append(
            f"{ranked['right']} of {ranked['ranked']} pairs of one group are ranked as measured "
            f"({ranked['right_percent']} %)."
        )
    if summary.get("beyond_limit"):
        said.append(
            f"{summary['beyond_limit']} rows claim more tokens a second than the data sheet's bandwidth and FLOP/s "
            "allow at the load that they state. They count above; `within_limits` leaves them out."
        )
    return said


# --- a page -------------------------------------------------------------------------------------------------

_TITLE = """# Accuracy of the predictions

What `shardwise validate` printed; it makes the sections below. No row is in the product: constants are in
`strategies/engines.yaml`, fitted by `tests/bench/fit_engines.py` to the two thirds of the serving rows that a hash of
their ids picks (`fitted`); the other third (`held_out`) is not fitted to.
"""


def write_report(path: Path, kind: str, summary: Mapping[str, object], source: str) -> None:
    """Puts the section of a kind of rows into the page, in place of an older one. Raises BadRequest."""
    begin, end = f"<!-- {kind} -->", f"<!-- end of {kind} -->"
    lines = [begin, f"## {kind.capitalize()} rows", ""]
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    lines += [f"`shardwise validate {Path(source).name} --report {path}`, {date}, commit {_commit()}.", ""]
    lines += [*(f"{said}\n" for said in sentences(summary))]
    for title, rows in tables(summary):
        lines += [f"| {title} | rows | MAPE % | median % | bias % |", "|---|--:|--:|--:|--:|"]
        for name, found in rows.items():
            cells = [found[k] for k in ("rows", "mape_percent", "median_percent", "bias_percent")]
            lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c}" for c in cells) + " |")
        lines.append("")
    section = "\n".join([*lines, end]) + "\n"
    try:
        page = path.read_text(encoding="utf-8") if path.exists() else _TITLE
        if begin in page and end in page:
            before, rest = page.split(begin, 1)
            page = before + section + rest.split(end, 1)[1].lstrip("\n")
        else:
            page = f"{page.rstrip()}\n\n{section}"
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise BadRequest(
            f"--report {path} cannot be written ({error.strerror}); give a file in a directory"
        ) from None


def _commit() -> str:
    """Of the working tree that this package lies in; `unknown` where there is none."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
