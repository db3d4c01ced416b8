"""`shardwise claims`: what deployment guides promise, beside what data sheets and the cost model give."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import BadRequest
from launch.claim_checks import CLAIMS, Answer, Claim

if TYPE_CHECKING:
    from launch.claim_measure import Measurement

MEASURED_TITLE = "## Measured"
_TITLE = """# What deployment guides claim

Made by `shardwise claims --report {path}`. The claims are those of five widely read guides to running DeepSeek models
on one and two RTX 4090s, A100s and H100s; what stands beside them is computed from the data sheets of
`cluster/catalog.yaml` and the cost model.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="*", metavar="ID", help="only these, such as A4 B2; default: all")
    parser.add_argument(
        "--report", metavar="FILE.md", help="write the table as a page, as docs/claims.md is made"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="run what they promise of CUDA graphs, pinned memory, pruning, INT8 and batch sizes (A6, C5) on this "
        "machine's first device; with --report FILE.md the page has it too",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="to measure on; default: cuda where there is one",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    if args.device != "auto" and not args.measure:
        raise BadRequest("--device is of --measure; add that, or leave --device away")
    found = _measured(args) if args.measure else None
    answered = [(claim, claim.check()) for claim in chosen(args.ids)]
    if args.report:
        write(Path(args.report), answered, found)
    if args.json:
        rows = [
            {"id": c.id, "claim": c.said, "gives": a.gives, "verdict": a.verdict, "why": a.why}
            for c, a in answered
        ]
        made: dict[str, object] = {"claims": rows}
        if found is not None:
            made["measured"] = asdict(found)
        print(json.dumps(made, indent=2, ensure_ascii=False))
    elif found is not None:
        show_measured(found)
    else:
        show(answered)
    return 0


def _measured(args: argparse.Namespace) -> Measurement:
    from launch.claim_measure import measure, parts_of
    from launch.progress import Progress

    chosen(args.ids)
    return measure(parts_of(args.ids), args.device, Progress())


def chosen(ids: list[str]) -> list[Claim]:
    """Those of these ids, in any case; all where none is given. Raises BadRequest."""
    known = {claim.id: claim for claim in CLAIMS}
    for name in ids:
        if name.upper() not in known:
            raise BadRequest(f"no claim {name!r}; they are {', '.join(known)}")
    return [known[name.upper()] for name in ids] or CLAIMS


def show(answered: list[tuple[Claim, Answer]]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for claim, answer in answered:
        console.print(f"{claim.id}  {claim.said}", style="bold")
        console.print(f"    {answer.verdict}: {answer.gives}.")
        console.print(f"    {answer.why}.", "")


def show_measured(found: Measurement) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(found.told, "")
    for row in found.rows:
        console.print(f"{row.id}  {row.claim}", style="bold")
        console.print(f"    measured here: {row.measured}.")
        console.print(f"    {row.verdict}: {row.why}.", "")


def write(path: Path, answered: list[tuple[Claim, Answer]], found: Measurement | None = None) -> None:
    """Raises BadRequest."""
    lines = [
        _TITLE.format(path=path),
        "| id | claim | what physics and the model give | verdict | why |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {c.id} | {c.said} | {a.gives} | **{a.verdict}** | {a.why} |" for c, a in answered]
    if found is not None:
        lines += ["", MEASURED_TITLE, "", f"By `shardwise claims --measure`: {found.told}.", ""]
        lines += ["| id | claim | measured | verdict | why |", "|---|---|---|---|---|"]
        lines += [f"| {r.id} | {r.claim} | {r.measured} | **{r.verdict}** | {r.why} |" for r in found.rows]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadRequest(
            f"--report {path} cannot be written ({error.strerror}); give a file in a directory"
        ) from None
