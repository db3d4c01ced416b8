"""What was proved of a machine's links, as data, kept beside its profile. Pure; cluster/prove.py makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path as File

import msgspec

from cluster.files import keep_whole, read_back
from cluster.paths import Path
from cluster.profile import fingerprint_of, key_of
from cluster.topology import Topology

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Trusted:
    """What ranks may use, and the environment that keeps NCCL to it."""

    paths: tuple[Path, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Outcome(StrEnum):
    PASSED = "passed"
    WRONG = "wrong data"
    HUNG = "hung"
    CRASHED = "crashed"
    UNUSABLE = "unusable"
    MEMORY = "out of memory"  # which says nothing of the links: somebody else may hold it
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Step:
    """What came of a rung."""

    rung: str
    path: Path | None
    outcome: Outcome
    evidence: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Proof:
    format: int
    machine: str
    fingerprint: str
    proved_at: str  # ISO 8601, UTC
    ranks: int
    steps: tuple[Step, ...]
    environment: Mapping[str, str]  # that NCCL must be told so as to keep to what was proved

    @property
    def paths(self) -> tuple[Path, ...]:
        """Those that may be trusted: every rung that was tried for them passed, or one in their stead."""
        return tuple(path for path in Path if self._trusts(path))

    @property
    def trusted(self) -> Trusted:
        return Trusted(self.paths, self.environment)

    @property
    def failures(self) -> tuple[Step, ...]:
        return tuple(s for s in self.steps if s.outcome not in (Outcome.PASSED, Outcome.SKIPPED))

    def _trusts(self, path: Path) -> bool:
        outcomes = [step.outcome for step in self.steps if step.path is path]
        if path in (Path.NCCL, Path.GLOO):  # rungs that stand in for each other
            return Outcome.PASSED in outcomes
        return bool(outcomes) and set(outcomes) == {Outcome.PASSED}


# --- kept on disk -------------------------------------------------------------------------------------------


def proof_path(cache_dir: File, topology: Topology) -> File:
    return cache_dir / f"proof-{key_of(topology)}.json"


def kept(cache_dir: File, topology: Topology) -> Proof | None:
    """None if there is none, or the devices, their links, driver, NCCL or torch are others now."""
    found = read_back(proof_path(cache_dir, topology), Proof)
    same = found is not None and (found.format, found.fingerprint) == (FORMAT, fingerprint_of(topology))
    return found if same else None


def keep(proof: Proof, cache_dir: File, topology: Topology) -> None:
    keep_whole(msgspec.json.format(msgspec.json.encode(proof)), proof_path(cache_dir, topology))
