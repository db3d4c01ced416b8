"""The folder that a comparison leaves: results.json, results.csv, report.html and report.png."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from cluster.profile import write_whole
from launch.report import Comparison, comparison_to_json, to_csv


def write(folder: Path, made: Comparison) -> Iterator[str]:
    """What was written, in words. The last, the picture, needs matplotlib."""
    results = json.loads(json.dumps(comparison_to_json(made)))
    write_whole((json.dumps(results, indent=1) + "\n").encode(), folder / "results.json")
    yield from render(folder, results)


def render(folder: Path, results: Mapping[str, object]) -> Iterator[str]:
    write_whole(to_csv(results).encode(), folder / "results.csv")
    yield f"results and report are in {folder}"
