"""Measurements of earlier comparisons, kept beside the machine's profile, for the plans that come after."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cluster.files import keep_whole, read_back
from cluster.profile import fingerprint_of, key_of
from cluster.topology import Topology
from strategies.kept import Kept
from strategies.spec import ModelSpec

FORMAT = 1
MOST = 1000  # of one model on one machine; the newest are kept


@dataclass(frozen=True, slots=True)
class _File:
    format: int
    fingerprint: str  # of the machine, with driver, NCCL and torch: what it was measured with
    kept: list[Kept]


@dataclass(frozen=True, slots=True)
class Shelf:
    """Of a model in a dtype on a machine, under the engine's limits."""

    path: Path
    fingerprint: str

    def read(self) -> list[Kept]:
        """Empty where nothing is kept, or the machine is not what it was."""
        found = read_back(self.path, _File)
        if found is None or (found.format, found.fingerprint) != (FORMAT, self.fingerprint):
            return []
        return found.kept

    def add(self, new: Sequence[Kept]) -> None:
        """In place of what was kept of the same layouts and loads."""
        again = {(one.layout, one.load) for one in new}
        rest = [one for one in self.read() if (one.layout, one.load) not in again]
        whole = _File(FORMAT, self.fingerprint, [*rest, *new][-MOST:])
        keep_whole(msgspec.json.format(msgspec.json.encode(whole)), self.path)


def shelf(
    cache: Path, topology: Topology, spec: ModelSpec, dtype: str, *, chunk_tokens: int, max_sequences: int
) -> Shelf:
    what = f"{spec!r} {dtype} {chunk_tokens} {max_sequences}"
    name = f"measured-{key_of(topology)}-{zlib.crc32(what.encode()):08x}.json"
    return Shelf(cache / name, fingerprint_of(topology))
