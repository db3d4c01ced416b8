"""`shardwise claims`: what deployment guides promise, beside what data sheets and the cost model give."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cluster.errors import BadRequest
from launch.claim_checks import CLAIMS, Answer, Claim

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
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    answered = [(claim, claim.check()) for claim in chosen(args.ids)]
    if args.report:
        write(Path(args.report), answered)
    if args.json:
        rows = [
            {"id": c.id, "claim": c.said, "gives": a.gives, "verdict": a.verdict, "why": a.why}
            for c, a in answered
        ]
        print(json.dumps({"claims": rows}, indent=2, ensure_ascii=False))
    else:
        show(answered)
    return 0


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


def write(path: Path, answered: list[tuple[Claim, Answer]]) -> None:
    """Raises BadRequest."""
    lines = [
        _TITLE.format(path=path),
        "| id | claim | what physics and the model give | verdict | why |",
        "|---|---|---|---|---|",
    ]
    lines += [f"| {c.id} | {c.said} | {a.gives} | **{a.verdict}** | {a.why} |" for c, a in answered]
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadRequest(
            f"--report {path} cannot be written ({error.strerror}); give a file in a directory"
        ) from None
