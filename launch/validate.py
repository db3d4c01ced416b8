"""`shardwise validate`: the cost model put beside what others measured, row by row, and its error by kind of row.

Reads CSV files of two kinds: serving (aiconfigurator's columns: ttft_ms and tpot_ms of an engine with so many requests
in flight) and layouts (published figures of one metric each, in groups where they are to be ranked).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import BadRequest
from launch.accuracy import Figures, sentences, summarise, tables, write_report
from launch.measured import (
    LAYOUT_COLUMNS,
    SERVING_COLUMNS,
    Prediction,
    Row,
    predict_layout,
    predict_serving,
)
from launch.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

MANY_ROWS = 500  # beyond which pricing takes seconds


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
    parser.add_argument(
        "--report", metavar="FILE.md", help="put the figures into a page, as docs/accuracy.md is made"
    )
    parser.add_argument("--out", metavar="PREDICTIONS.csv", help="write every row back with its prediction")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    header, rows = read(Path(args.file))
    kind = kind_of(header, args.file)
    pairs = predict_all(kind, rows)
    if args.out:
        write(Path(args.out), header, kind, pairs)
    summary = summarise(kind.name, pairs)
    if args.report:
        write_report(Path(args.report), kind.name, summary, args.file)
    if args.json:
        print(json.dumps(summary, indent=2))
    else:
        show(summary)
    return 0


def predict_all(kind: Kind, rows: Sequence[Row]) -> list[tuple[Row, Prediction]]:
    """Every row with its prediction; a bar where there are so many that it takes seconds."""
    with Progress(quiet=len(rows) < MANY_ROWS).bar(f"pricing {len(rows):,} rows", unit_is_bytes=False) as bar:
        pairs = []
        for i, row in enumerate(rows):
            pairs.append((row, kind.predict(row)))
            if i % 50 == 0:
                bar.update(i, len(rows))
        return pairs


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


# --- for people ---------------------------------------------------------------------------------------------


def show(summary: Mapping[str, object]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
    for said in sentences(summary):
        console.print(said)
    for title, rows in tables(summary):
        console.print(_table(title, rows))


def _table(title: str, rows: Mapping[str, Figures]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate((title, "rows", "MAPE %", "median %", "bias %")):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for name, found in rows.items():
        cells = [found[k] for k in ("rows", "mape_percent", "median_percent", "bias_percent")]
        told = ("" if c is None else f"{c}" if isinstance(c, int) else f"{c:.1f}" for c in cells)
        table.add_row(name, *told)
    return table
