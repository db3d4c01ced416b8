"""How long a collective takes by each path, as measured, and which path is best for a message. Pure.

A message's bytes are, on each rank: of an all-reduce the tensor; of an all-gather the gathered whole; of an
all-to-all the whole that is sent, a part to each rank; of send/recv the message.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

Point = tuple[int, float]  # bytes, seconds


class Op(StrEnum):
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"
    SEND_RECV = "send_recv"


class Path(StrEnum):
    """Ways between the ranks of a group. The one-shot ones are named as cluster/collectives/transports.py has them."""

    PEER = "peer memory"  # our one-shot kernel, pushing into the others' memory
    MAPPED = "mapped host memory"  # the same through host memory that all map
    NCCL = "nccl"
    SYMMETRIC = "symmetric memory"  # torch's own one- and two-shot kernels: measured, not used by the engine
    GLOO = "gloo"


ONE_SHOT_PATHS = (Path.PEER, Path.MAPPED)
"""For small sums, the one to try first first."""

ENGINE_PATHS = frozenset(Path) - {Path.SYMMETRIC}
"""Those that a replica's ranks can be told to use."""


@dataclass(frozen=True, slots=True)
class Fit:
    """seconds = latency_s + moved / bytes_per_s, where `moved` is `moved_share` of the message's bytes."""

    latency_s: float
    bytes_per_s: float
    residual: float  # the largest error at a measured size, as a share of its time


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by bytes of one collective over one path, ascending."""

    op: Op
    path: Path
    ranks: int
    in_graph: bool  # inside a CUDA graph, else launched one by one
    points: tuple[Point, ...]
    fit: Fit
    most_bytes: int | None = None  # the path takes no larger message; None: any

    def takes(self, n_bytes: float) -> bool:
        return self.most_bytes is None or n_bytes <= self.most_bytes

    def seconds(self, n_bytes: float) -> float:
        """Between two measured sizes along a straight line of logarithms; beyond the last, at the last's rate."""
        below = max((p for p in self.points if p[0] <= n_bytes), default=None)
        above = min((p for p in self.points if p[0] > n_bytes), default=None)
        if below is None:
            return self.points[0][1]
        if above is None:
            return below[1] + moved_share(self.op, self.ranks) * (n_bytes - below[0]) / _last_rate(self)
        along = math.log(n_bytes / below[0]) / math.log(above[0] / below[0])
        return float(below[1] * (above[1] / below[1]) ** along)


@dataclass(frozen=True, slots=True)
class Choice:
    path: Path
    seconds: float


def moved_share(op: Op, ranks: int) -> float:
    """Of a message's bytes, what a rank's link carries in one direction at least (NCCL-tests' bus bandwidth)."""
    return {Op.ALL_REDUCE: 2 * (ranks - 1) / ranks, Op.SEND_RECV: 1.0}.get(op, (ranks - 1) / ranks)


def best_path(
    curves: Iterable[Curve],
    op: Op,
    ranks: int,
    n_bytes: float,
    in_graph: bool,
    allowed: Collection[Path] = ENGINE_PATHS,
) -> Choice | None:
    """The fastest of the `allowed` paths for a message; None where none was measured for so many ranks."""
    choices = [
        Choice(curve.path, curve.seconds(n_bytes))
        for curve in _of(curves, op, ranks, in_graph)
        if curve.path in allowed and curve.takes(n_bytes)
    ]
    return min(choices, key=lambda choice: choice.seconds, default=None)


def crossovers(
    curves: Iterable[Curve],
    op: Op,
    ranks: int,
    in_graph: bool,
    allowed: Collection[Path] = ENGINE_PATHS,
) -> list[tuple[int, Path]]:
    """(bytes, path): from so many bytes on that path is the fastest, as far as the next entry."""
    own = [curve for curve in _of(curves, op, ranks, in_graph) if curve.path in allowed]
    sizes = {size for curve in own for size, _ in curve.points}
    sizes |= {curve.most_bytes + 1 for curve in own if curve.most_bytes is not None}
    found: list[tuple[int, Path]] = []
    before = 0
    for size in sorted(sizes):
        best = best_path(own, op, ranks, size, in_graph, allowed)
        if best is not None and (not found or found[-1][1] is not best.path):
            first = _turn(own, found[-1][1], best.path, before, size) if found else size
            found.append((first, best.path))
        before = size
    return found


def gains_up_to(curves: Iterable[Curve], path: Path, ranks: int) -> int | None:
    """Bytes up to which sums inside CUDA graphs are faster by `path` than by NCCL, as measured; 0: they never are.

    None where that was not measured, or no end of it seen.
    """
    own = [c for c in _of(curves, Op.ALL_REDUCE, ranks, True) if c.path in (path, Path.NCCL)]
    if len({curve.path for curve in own}) < 2:
        return None
    turns = crossovers(own, Op.ALL_REDUCE, ranks, True)
    if turns[-1][1] is path:
        return None
    return max((after - 1 for (_, by), (after, _) in pairwise(turns) if by is path), default=0)


def envelope(
    curves: Iterable[Curve],
    op: Op,
    ranks: int,
    in_graph: bool,
    allowed: Collection[Path] = ENGINE_PATHS,
) -> list[Point]:
    """The best time at every size that was measured by an allowed path."""
    own = [curve for curve in _of(curves, op, ranks, in_graph) if curve.path in allowed]
    sizes = sorted({size for curve in own for size, _ in curve.points})
    best = [(size, best_path(own, op, ranks, size, in_graph, allowed)) for size in sizes]
    return [(size, choice.seconds) for size, choice in best if choice is not None]


def curve_of(
    op: Op, path: Path, ranks: int, in_graph: bool, points: Sequence[Point], most_bytes: int | None = None
) -> Curve:
    share = moved_share(op, ranks)
    fitted = fit([(int(share * size), seconds) for size, seconds in points])
    return Curve(op, path, ranks, in_graph, tuple(sorted(points)), fitted, most_bytes)


def fit(points: Sequence[Point]) -> Fit:
    """The line through (bytes, seconds) with the least squared relative error, its latency at least 0."""
    weighted = [(1 / seconds**2, size, seconds) for size, seconds in points]
    total = sum(w for w, _, _ in weighted)
    # About the means: without them the sums of sizes that lie close together cancel to nothing.
    mean_size = sum(w * size for w, size, _ in weighted) / total
    mean_s = sum(w * seconds for w, _, seconds in weighted) / total
    spread = sum(w * (size - mean_size) ** 2 for w, size, _ in weighted)
    slope = sum(w * (size - mean_size) * (seconds - mean_s) for w, size, seconds in weighted) / (spread or 1)
    latency = mean_s - slope * mean_size
    if latency < 0:
        latency = 0.0
        slope = sum(w * size * seconds for w, size, seconds in weighted) / sum(
            w * size**2 for w, size, _ in weighted
        )
    if slope <= 0:  # all latency: the largest message bounds the bandwidth from below
        size, seconds = max(points)
        slope = seconds / size
    residual = max(abs(latency + slope * size - seconds) / seconds for size, seconds in points)
    return Fit(latency, 1 / slope, residual)


def _of(curves: Iterable[Curve], op: Op, ranks: int, in_graph: bool) -> list[Curve]:
    return [c for c in curves if (c.op, c.ranks, c.in_graph) == (op, ranks, in_graph)]


def _last_rate(curve: Curve) -> float:
    """Bytes moved a second between the last two sizes; of a curve that does not grow there, in all."""
    (size, seconds), *_ = reversed(curve.points)
    share = moved_share(curve.op, curve.ranks)
    if len(curve.points) > 1:
        before, before_s = curve.points[-2]
        if seconds > before_s:
            return share * (size - before) / (seconds - before_s)
    return share * size / seconds


def _turn(curves: Sequence[Curve], old: Path, new: Path, low: int, high: int) -> int:
    """The least size in (low, high] from which `new` is faster than `old`, to a part in a hundred."""

    def new_wins(size: float) -> bool:
        times = {c.path: c.seconds(size) for c in curves if c.takes(size)}
        return old not in times or (new in times and times[new] < times[old])

    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if new_wins(middle) else (middle, high)
    return high
