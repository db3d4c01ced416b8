"""What a comparison has measured so far: a line a trial, never rewritten, so that a run that ends early goes on later.

The first line says what the run is of. A journal is only gone on with where all of that is still so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cluster.errors import UserError
from cluster.files import DAMAGED
from launch.trial import Trial

FORMAT = 1
NAME = "journal.jsonl"

Facts = Mapping[str, str]
"""What a run is of: model, machine, lengths, engine flags; words, to be told apart in an error."""

Trials = dict[str, dict[int, Trial]]
"""By layout's name or endpoint's address, then concurrency."""


@dataclass(frozen=True, slots=True)
class Head:
    format: int
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class Line:
    layout: str
    concurrency: int
    trial: Trial


def key_of(facts: Facts) -> str:
    return hashlib.sha256(msgspec.json.encode(sorted(facts.items()))).hexdigest()[:8]


@dataclass(slots=True)
class Journal:
    path: Path
    trials: Trials = field(default_factory=dict)

    @property
    def layouts(self) -> Trials:
        return {name: trials for name, trials in self.trials.items() if not _is_endpoint(name)}

    @property
    def endpoints(self) -> Trials:
        return {name: trials for name, trials in self.trials.items() if _is_endpoint(name)}

    def add(self, layout: str, concurrency: int, trial: Trial) -> None:
        """On disk before it returns."""
        self.trials.setdefault(layout, {})[concurrency] = trial
        _append(self.path, msgspec.json.encode(Line(layout, concurrency, trial)))

    def has(self, layout: str, concurrency: int) -> bool:
        """Measured; what failed is tried again."""
        trial = self.trials.get(layout, {}).get(concurrency)
        return trial is not None and trial.measured is not None


def _is_endpoint(name: str) -> bool:
    return "://" in name


def open_journal(folder: Path, facts: Facts, *, fresh: bool) -> Journal:
    """The folder's journal, with what it holds. `fresh`: what it held is kept aside.

    Raises UserError where it is of something else, or cannot be read or written.
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists() and fresh:
            path.replace(path.with_suffix(".before.jsonl"))
        if not path.exists():
            _append(path, msgspec.json.encode(Head(FORMAT, dict(facts))))
            return Journal(path)
        return _read(path, facts)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}; give a folder that can be written") from None


def _read(path: Path, facts: Facts) -> Journal:
    found = Journal(path)
    with path.open("rb") as file:
        first, *rest = file.read().split(b"\n")
    try:
        head = msgspec.json.decode(first, type=Head)
    except DAMAGED:
        head = Head(0, {})
    if head.format != FORMAT:
        raise UserError(
            f"{path} is damaged, or no journal of this version; give another --out, or --fresh to begin anew"
        )
    changed = changes(head.facts, facts)
    if changed:
        raise UserError(
            f"{path.parent} holds another run ({changed}); give another --out, or --fresh to begin anew"
        )
    for line in rest:
        try:
            one = msgspec.json.decode(line, type=Line)
        except DAMAGED:  # the end of a line that a crash cut short
            continue
        found.trials.setdefault(one.layout, {})[one.concurrency] = one.trial
    return found


def changes(before: Facts, now: Facts) -> str:
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    told = [f"{name} was {before.get(name, 'unknown')}, is {now.get(name, 'unknown')}" for name in names]
    return "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "")


def _append(path: Path, line: bytes) -> None:
    """A line that a crash cut short ends here, so that this one is whole."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())
