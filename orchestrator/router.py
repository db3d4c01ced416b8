"""Which replica takes a request: a pure choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outstanding:
    """What a replica has been given and has not finished."""

    replica: int
    requests: int
    tokens: int  # prompt and still possible output: what is left for it to do at most


def choose(replicas: Sequence[Outstanding]) -> int:
    """The replica with the least left to do; on a tie the one with the fewest requests, then the first."""
    return min(replicas, key=lambda r: (r.tokens, r.requests, r.replica)).replica
