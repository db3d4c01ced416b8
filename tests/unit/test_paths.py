"""Measured curves: what a message takes by each path, and where one path overtakes another."""

from __future__ import annotations

import csv
from pathlib import Path as File

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.paths import Choice, Curve, Op, Path, best_path, crossovers, curve_of, envelope, gains_up_to

CSV = File(__file__).parents[1] / "topologies" / "links_2xh100.csv"
NAMES = {
    "nccl_all_reduce": (Op.ALL_REDUCE, Path.NCCL, None),
    "symm_mem_one_shot": (Op.ALL_REDUCE, Path.SYMMETRIC, 1 << 20),
    "mapped_one_shot": (Op.ALL_REDUCE, Path.MAPPED, 1 << 20),
    "peer_one_shot": (Op.ALL_REDUCE, Path.PEER, 1 << 20),
    "nccl_send_recv": (Op.SEND_RECV, Path.NCCL, None),
}


def captured(link: str) -> list[Curve]:
    """Two H100s, as measured over NVLink ("nvlink") and with NCCL_P2P_DISABLE=1 ("host")."""
    points: dict[tuple[str, bool], list[tuple[int, float]]] = {}
    for row in csv.DictReader(CSV.open()):
        for in_graph, column in ((False, "latency_us_eager"), (True, "latency_us_in_cuda_graph")):
            if row["path"] == link and row[column] and row["op"] in NAMES:
                points.setdefault((row["op"], in_graph), []).append(
                    (int(row["bytes"]), float(row[column]) * 1e-6)
                )
    return [
        curve_of(NAMES[name][0], NAMES[name][1], 2, in_graph, found, NAMES[name][2])
        for (name, in_graph), found in points.items()
    ]


@pytest.mark.parametrize(
    ("link", "n_bytes", "path", "microseconds"),
    [
        ("nvlink", 16384, Path.PEER, 3.6),
        ("nvlink", 1 << 20, Path.PEER, 9.3),
        ("nvlink", 16 << 20, Path.NCCL, 78.9),
        ("host", 16384, Path.MAPPED, 5.4),
        ("host", 512 << 10, Path.MAPPED, 37.9),
        ("host", 1 << 20, Path.NCCL, 66.4),
    ],
)
def test_the_fastest_path_on_the_captured_pair(
    link: str, n_bytes: int, path: Path, microseconds: float
) -> None:
    best = best_path(captured(link), Op.ALL_REDUCE, 2, n_bytes, in_graph=True)
    assert best == Choice(path, pytest.approx(microseconds * 1e-6))


def test_crossovers_of_the_captured_pair() -> None:
    assert crossovers(captured("nvlink"), Op.ALL_REDUCE, 2, True) == [
        (4096, Path.PEER),
        ((1 << 20) + 1, Path.NCCL),
    ]
    (small, first), (turn, second) = crossovers(captured("host"), Op.ALL_REDUCE, 2, True)
    assert (small, first, second) == (4096, Path.MAPPED, Path.NCCL)
    assert 512 << 10 < turn < 1 << 20, "between the two sizes that were measured on either side"
    assert crossovers(captured("host"), Op.ALL_TO_ALL, 2, True) == []


def test_the_engine_is_not_sent_where_it_cannot_go() -> None:
    """Torch's symmetric memory is measured for comparison alone."""
    curves = [curve for curve in captured("nvlink") if curve.path is not Path.PEER]
    assert best_path(curves, Op.ALL_REDUCE, 2, 8192, True) == Choice(Path.NCCL, pytest.approx(12.3e-6))
    everything = best_path(curves, Op.ALL_REDUCE, 2, 8192, True, allowed=set(Path))
    assert everything == Choice(Path.SYMMETRIC, pytest.approx(8.4e-6))


def test_what_was_not_measured_has_no_best_path() -> None:
    assert best_path(captured("host"), Op.ALL_REDUCE, 4, 8192, True) is None
    assert best_path([], Op.ALL_REDUCE, 2, 8192, True) is None


def test_a_curve_between_before_and_beyond_its_points() -> None:
    curve = curve_of(Op.SEND_RECV, Path.NCCL, 2, False, [(1000, 1e-5), (4000, 2e-5), (1_000_000, 1e-4)])
    assert curve.seconds(10) == 1e-5
    assert curve.seconds(2000) == pytest.approx(1e-5 * 2**0.5), "half way of the logarithms"
    rate = (1_000_000 - 4000) / 8e-5
    assert curve.seconds(3_000_000) == pytest.approx(1e-4 + 2_000_000 / rate), (
        "at the rate of its last stretch"
    )


POINTS = st.lists(
    st.tuples(st.integers(1, 2**28), st.floats(1e-6, 1.0)), min_size=1, max_size=9, unique_by=lambda p: p[0]
)


@given(one=POINTS, other=POINTS, most=st.integers(1, 2**28), n_bytes=st.integers(1, 2**29))
def test_the_crossovers_say_what_best_path_says(
    one: list[tuple[int, float]], other: list[tuple[int, float]], most: int, n_bytes: int
) -> None:
    """At the sizes that were measured; between them a line may cross another twice."""
    curves = [
        curve_of(Op.ALL_REDUCE, Path.NCCL, 2, True, one),
        curve_of(Op.ALL_REDUCE, Path.MAPPED, 2, True, other, most),
    ]
    found = crossovers(curves, Op.ALL_REDUCE, 2, True)
    for size, seconds in envelope(curves, Op.ALL_REDUCE, 2, True):
        best = best_path(curves, Op.ALL_REDUCE, 2, size, True)
        assert best is not None
        assert best.seconds == seconds
        path = [path for first, path in found if first <= size][-1]
        assert next(c for c in curves if c.path is path).seconds(size) == pytest.approx(seconds)
    best = best_path(curves, Op.ALL_REDUCE, 2, n_bytes, True)
    assert best is not None
    assert best.path is Path.NCCL or n_bytes <= most


@pytest.mark.parametrize(
    ("microseconds", "most"),
    [
        ((2, 5, 30), None),
        ((2, 5, 50), (64 << 10, 1 << 20)),
        ((20, 20, 60), (0, 0)),
        ((20, 5, 60), (64 << 10, 1 << 20)),
    ],
)
def test_where_a_way_ceases_to_gain(microseconds: tuple[int, ...], most: tuple[int, int] | None) -> None:
    sizes = (4 << 10, 64 << 10, 1 << 20)
    timed = {Path.PEER: microseconds, Path.NCCL: (10, 10, 40), Path.SYMMETRIC: (1, 1, 1)}
    curves = [
        curve_of(Op.ALL_REDUCE, path, 2, True, [(n, s * 1e-6) for n, s in zip(sizes, seconds, strict=True)])
        for path, seconds in timed.items()
    ]
    found = gains_up_to(curves, Path.PEER, 2)
    assert (found is None) == (most is None)
    if found is not None and most is not None:
        assert most[0] <= found <= most[1]
    assert gains_up_to(curves, Path.MAPPED, 2) is None
    assert gains_up_to(curves, Path.PEER, 4) is None
