"""`shardwise validate`: the cost model put beside what others measured, row by row, and its error by kind of row.

Reads CSV files of two kinds: serving (aiconfigurator's columns: ttft_ms and tpot_ms of an engine with so many requests
in flight) and layouts (published figures of one metric each, in groups where they are to be ranked).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import itemgetter
from pathlib import Path

from cluster.errors import BadRequest
from launch.measured import (
    LAYOUT_COLUMNS,
    SERVING_COLUMNS,
    Prediction,
    predict_layout,
    predict_serving,
    spec_at,
)

Row = Mapping[str, str]
LOW_CONCURRENCY = 8  # rows up to here hold the load generator's queueing more than the engine's


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of file: what it must have, what is added to it, and how a row is predicted."""

    name: str
    required: Sequence[str]
    added: Sequence[str]
    predict: Callable[[Row], Prediction]


SERVING = Kind(
    "serving", SERVING_COLUMNS, ("predicted_ttft_ms", "predicted_tpot_ms", "reason"), predict_serving
)
LAYOUTS = Kind("layouts", LAYOUT_COLUMNS, ("predicted_value", "reason"), predict_layout)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        metavar="FILE.csv",
        help="measured rows: columns of measured_serving.csv or published_layouts.csv",
    )
    parser.add_argument("--out", metavar="PREDICTIONS.csv", help="write every row back with its prediction")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    header, rows = read(Path(args.file))
    kind = kind_of(header, args.file)
    pairs = [(row, kind.predict(row)) for row in rows]
    if args.out:
        write(Path(args.out), header, kind, pairs)
    summary = summarise(kind, pairs)
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary)
    return 0


# --- files --------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The header and the rows, every cell a string. Raises BadRequest."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", restval="")
            header = list(reader.fieldnames or ())
            rows = [{key: row[key] or "" for key in header} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        raise BadRequest(f"{path} cannot be read ({said}); give a CSV file of measured rows") from None
    if not rows:
        raise BadRequest(f"{path} has no rows; give a CSV file with a header and at least one measured row")
    return header, rows


def kind_of(header: Sequence[str], name: str) -> Kind:
    """Raises BadRequest, naming what the nearest kind lacks."""
    missing = {kind.name: [c for c in kind.required if c not in header] for kind in (SERVING, LAYOUTS)}
    for kind in (SERVING, LAYOUTS):
        if not missing[kind.name]:
            return kind
    nearest = min(missing, key=lambda key: len(missing[key]))
    lacks = ", ".join(missing[nearest])
    raise BadRequest(
        f"{name} has no column {lacks}; a {nearest} file needs {'it' if len(missing[nearest]) == 1 else 'them'}"
    )


def write(path: Path, header: Sequence[str], kind: Kind, pairs: Iterable[tuple[Row, Prediction]]) -> None:
    """Every row as it was, with its prediction: empty cells and a reason where there is none. Raises BadRequest."""
    columns = [*(c for c in header if c not in kind.added), *kind.added]
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            for row, made in pairs:
                writer.writerow({**row, **made.cells(kind.added)})
    except OSError as error:
        raise BadRequest(
            f"--out {path} cannot be written ({error.strerror}); give a file in a directory that exists"
        ) from None


# --- errors -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Error:
    """A measured figure beside its prediction; the row's model, system and engine."""

    row: Row
    metric: str
    measured: float
    predicted: float

    @property
    def signed(self) -> float:
        return self.predicted / self.measured - 1


def errors_of(pairs: Iterable[tuple[Row, Prediction]]) -> list[Error]:
    found = []
    for row, made in pairs:
        for metric, column, predicted in made.figures(row):
            measured = number(row.get(column, ""))
            if measured is not None and measured > 0 and predicted is not None:
                found.append(Error(row, metric, measured, predicted))
    return found


def number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value == value and abs(value) != float("inf") else None


def summarise(kind: Kind, pairs: Sequence[tuple[Row, Prediction]]) -> dict[str, object]:
    """What `--json` prints: rows, refusals, and errors overall, by class and by model, system and engine."""
    errors = errors_of(pairs)
    refused = [made.reason for _, made in pairs if made.reason]
    summary: dict[str, object] = {
        "kind": kind.name,
        "rows": len(pairs),
        "refused": len(refused),
        "refused_percent": round(100 * len(refused) / len(pairs), 2),
        "reasons": {reason: refused.count(reason) for reason in dict.fromkeys(refused)},
    }
    if kind is LAYOUTS:
        right, ranked = pairs_ranked(pairs)
        summary["errors"] = {"all": _figures(errors)}
        summary["pairs"] = {"ranked": ranked, "right": right, "right_percent": _percent(right, ranked)}
        summary["by_gpu"] = _by(errors, itemgetter("gpu"))
        summary["by_engine"] = _by(errors, itemgetter("engine"))
        return summary
    tpot = [e for e in errors if e.metric == "tpot"]
    ttft = [e for e in errors if e.metric == "ttft"]
    dense = {path: _is_dense(path) for path in {row["model_path"] for row, _ in pairs}}
    low = [e for e in ttft if (number(e.row["concurrency"]) or 0) <= LOW_CONCURRENCY]
    summary["errors"] = {
        "tpot_dense": _figures([e for e in tpot if dense[e.row["model_path"]]]),
        "tpot_moe": _figures([e for e in tpot if not dense[e.row["model_path"]]]),
        f"ttft_dense_concurrency_to_{LOW_CONCURRENCY}": _figures(
            [e for e in low if dense[e.row["model_path"]]]
        ),
        f"ttft_moe_concurrency_to_{LOW_CONCURRENCY}": _figures(
            [e for e in low if not dense[e.row["model_path"]]]
        ),
        "ttft_all": _figures(ttft),
    }
    for name, column in (("model", "model_path"), ("system", "system"), ("engine", "backend")):
        summary[f"by_{name}"] = {
            metric: _by([e for e in errors if e.metric == metric], itemgetter(column))
            for metric in ("tpot", "ttft")
        }
    return summary


def _is_dense(model_path: str) -> bool:
    spec = spec_at(model_path)
    return spec is None or spec.is_dense


def _figures(errors: Sequence[Error]) -> dict[str, float | int | None]:
    size = [abs(e.signed) for e in errors]
    return {
        "rows": len(errors),
        "mape_percent": round(100 * statistics.fmean(size), 2) if size else None,
        "median_percent": round(100 * statistics.median(size), 2) if size else None,
        "bias_percent": round(100 * statistics.median(e.signed for e in errors), 2) if size else None,
    }


def _by(errors: Sequence[Error], key: Callable[[Row], str]) -> dict[str, dict[str, float | int | None]]:
    groups: dict[str, list[Error]] = {}
    for error in errors:
        groups.setdefault(key(error.row), []).append(error)
    return {name: _figures(groups[name]) for name in sorted(groups)}


def pairs_ranked(pairs: Sequence[tuple[Row, Prediction]]) -> tuple[int, int]:
    """Pairs of one group that the predictions put in the measured order, and pairs there are.

    A pair with a row that was refused counts as wrong.
    """
    groups: dict[str, list[tuple[float, float | None]]] = {}
    for row, made in pairs:
        measured = number(row["value"])
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


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole else None


# --- for people ---------------------------------------------------------------------------------------------


def show(summary: Mapping[str, object], file: object = None) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
    console.print(
        f"{summary['rows']} {summary['kind']} rows, {summary['refused']} refused ({summary['refused_percent']} %)"
    )
    reasons = summary["reasons"]
    assert isinstance(reasons, dict)
    for reason, times in reasons.items():
        console.print(f"  {times} × {reason}")
    if "pairs" in summary:
        ranked = summary["pairs"]
        assert isinstance(ranked, dict)
        console.print(
            f"{ranked['right']} of {ranked['ranked']} pairs of one group ranked as measured "
            f"({ranked['right_percent']} %)"
        )
    for title, table in _tables(summary):
        console.print(_table(title, table))


def _tables(summary: Mapping[str, object]) -> Iterable[tuple[str, Mapping[str, Mapping[str, object]]]]:
    for key, value in summary.items():
        if key == "errors" or key.startswith("by_"):
            assert isinstance(value, dict)
            name = key.replace("_", " ")
            if "tpot" in value and "rows" not in value["tpot"]:
                for metric in ("tpot", "ttft"):
                    yield f"{metric.upper()} {name}", value[metric]
            else:
                yield name, value


def _table(title: str, rows: Mapping[str, Mapping[str, object]]) -> object:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate((title, "rows", "MAPE %", "median %", "bias %")):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for name, figures in rows.items():
        cells = [figures[k] for k in ("rows", "mape_percent", "median_percent", "bias_percent")]
        table.add_row(
            name, *("" if c is None else f"{c}" if isinstance(c, int) else f"{c:.1f}" for c in cells)
        )
    return table
