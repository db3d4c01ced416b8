"""The folder that a comparison leaves: results.json, results.csv, report.html and report.png."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launch.report import Comparison, comparison_to_json, rows, to_csv
from launch.report_figures import figures
from launch.report_image import image
from launch.report_page import page


def write(folder: Path, made: Comparison) -> Iterator[str]:
    """Writes all four. → what to say of them."""
    results = json.loads(json.dumps(comparison_to_json(made)))
    results["made_at"] = datetime.now(UTC).isoformat(timespec="seconds")
    results["torch"] = _version("torch")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    yield from render(folder, results)


def render(folder: Path, results: Mapping[str, Any]) -> Iterator[str]:
    """The other three, from results.json's object alone: also on another machine, and later."""
    found = figures(results)
    (folder / "results.csv").write_text(to_csv(results), encoding="utf-8")
    html = page(results, found, list(rows(results)), results["made_at"])
    (folder / "report.html").write_text(html, encoding="utf-8")
    try:
        (folder / "report.png").write_bytes(image(found, f"{found.heading} ({results['made_at'][:10]})"))
    except ImportError:
        yield f"no report.png: it is drawn by matplotlib, which is not installed; {folder}/report.html has the same"
    yield f"results and report are in {folder}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
