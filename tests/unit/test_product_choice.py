"""Which kernel makes a product: what is tried where, what wins, and that layers then go that way. No GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from orchestrator.engine import ops, product_choice
from orchestrator.engine.kernels import hopper
from orchestrator.engine.kernels.hopper import LARGEST_CLUSTER, MANY, SHARED_BYTES, Tile, likeliest
from orchestrator.engine.model import GateUp, Linear
from orchestrator.engine.ops import Way
from orchestrator.engine.product_choice import (
    CUBLAS,
    FEW_ROWS,
    Decision,
    Kind,
    Place,
    Trial,
    choose,
    fastest,
    places,
    tiles_for,
    told,
)

PROCESSORS = 132
DOWN, GATE_UP, HEAD = Kind(4096, 14336, False), Kind(28672, 4096, True), Kind(128256, 4096, False)


@given(step_tokens=st.integers(1, 20_000))
def test_places_hold_each_number_of_rows_once_and_are_tried_at_one_of_theirs(step_tokens: int) -> None:
    found = places(step_tokens)
    for place in found:
        assert place.tried_rows in place.rows or place.tried_rows <= FEW_ROWS[-1]
    for rows in range(1, step_tokens + 1, 7):
        among = [place for place in found if rows in place.rows]
        assert len(among) == (2 < rows <= FEW_ROWS[-1] or rows >= 1024), rows


@given(
    m=st.integers(1, 256),
    n=st.integers(64, 4096).map(lambda n: n * 16),
    k=st.integers(128, 4096).map(lambda k: k * 8),
    gated=st.booleans(),
)
def test_likely_tiles_hold_all_rows_and_fit_a_processor(m: int, n: int, k: int, gated: bool) -> None:
    found = likeliest(m, n, k, PROCESSORS, 3, gated=gated)
    assert len(found) == len(set(found)) == 3
    for tile in found:
        assert tile.rows >= m
        assert tile.shared_bytes <= SHARED_BYTES
        assert tile.cluster <= LARGEST_CLUSTER
        assert tile.blocks(n) % tile.cluster == 0
        assert tile.blocks(n) // tile.split * tile.columns >= n, "some of the weight's rows are in no tile"


@pytest.mark.parametrize(
    ("rows", "columns", "possible"),
    [(256, 128, True), (256, 144, False), (192, 192, True), (192, 208, False), (128, 256, True)],
)
def test_a_tile_leaves_the_compiler_registers_enough(rows: int, columns: int, possible: bool) -> None:
    assert Tile(rows, columns, 1, 1).possible == possible  # as ptxas found: 256 × 144 wants 98, and gets 96


def test_many_rows_fit_a_processor_too() -> None:
    assert MANY.possible
    assert MANY.shared_bytes <= SHARED_BYTES


@pytest.mark.parametrize("kind", [DOWN, GATE_UP])
def test_a_likely_tile_keeps_nearly_all_processors_at_work_at_once(kind: Kind) -> None:
    best = likeliest(128, kind.n, kind.k, PROCESSORS, 1, gated=kind.gated)[0]
    assert 0.9 * PROCESSORS <= best.blocks(kind.n) <= PROCESSORS, best


def test_tiles_are_tried_only_where_they_may_win() -> None:
    few, many = Place(range(65, 129), 128), Place(range(4096, 2**31), 8192)

    def tried(kind: Kind, place: Place, alone: bool = True) -> list[Tile]:
        return tiles_for(kind, place, PROCESSORS, torch.bfloat16, alone=alone)

    assert {tile.gated for tile in tried(GATE_UP, few)} == {True}
    assert tried(GATE_UP, many) == [MANY]
    assert tried(GATE_UP, many, alone=False) == [], "beside sums of ranks its blocks would come last"
    assert tried(DOWN, many) == []
    assert tried(HEAD, few) == []
    assert tried(Kind(1003, 4096, False), few) == [], "its stores are of four columns"
    assert tiles_for(DOWN, few, PROCESSORS, torch.float32, alone=True) == []


def test_only_what_is_faster_by_more_than_chance_wins() -> None:
    assert fastest({CUBLAS: 100.0, "a": 90.0, "b": 80.0}) == "b"
    assert fastest({CUBLAS: 100.0, "a": 99.5}) == CUBLAS
    assert fastest({CUBLAS: 100.0}) == CUBLAS


def test_what_was_chosen_is_told_with_its_times() -> None:
    some = [
        Decision("hopper.cu 1", 30e-6, 20e-6),
        Decision("cuBLASLt's 3", 50e-6, 45e-6),
        Decision(CUBLAS, 1e-6, 1e-6),
    ]
    choice = told(some)
    assert "our kernels in 1 and another algorithm in 1 of 3 cases" in choice.reason
    assert "takes 65 µs" in choice.reason
    assert "80" in choice.reason
    assert told(some[2:]).path == CUBLAS


def doubled(x: Tensor, weight: Tensor) -> Tensor:
    return 2 * F.linear(x, weight)


def test_a_layer_goes_the_way_of_its_number_of_rows() -> None:
    layer, joined = Linear(8, 6, bias=False), GateUp(8, 6, bias=False)
    for each in (layer, joined):
        torch.nn.init.normal_(each.weight)
        each.ways = (Way(range(3, 5), doubled),)
    assert Linear.ways == (), "other layers have none of it"
    for rows in (2, 3, 4, 5):
        x = torch.randn(rows, 8)
        expected = F.linear(x, layer.weight)
        assert torch.equal(layer(x), 2 * expected if rows in (3, 4) else expected)
        both = F.linear(x, joined.weight)
        plain = ops.gate_up(x, joined.weight, None)
        assert torch.equal(joined(x), 2 * both if rows in (3, 4) else plain)


@pytest.mark.parametrize(("fast_s", "chosen"), [(1.0, "right"), (9.0, "right"), (11.0, CUBLAS)])
def test_a_wrong_product_never_wins_and_all_layers_go_the_winners_way(
    monkeypatch: pytest.MonkeyPatch, fast_s: float, chosen: str
) -> None:
    layers = [Linear(16, 4, bias=False) for _ in range(3)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight)
        layer.register_forward_hook(lambda *_: pytest.fail("a trial summed with other ranks"))

    def right(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def nothing(x: Tensor, weight: Tensor) -> Tensor:
        return torch.full((len(x), len(weight)), torch.nan)

    seconds = iter([10.0, fast_s])  # cuBLAS, right: the others are not even timed

    def median_s(_calls: Sequence[Callable[[], object]]) -> float:
        return next(seconds)

    monkeypatch.setattr(product_choice, "median_s", median_s)
    place = Place(range(3, 65), 64)
    offers = {"wrong": doubled, "right": right, "nan": nothing}
    decision = Trial(Kind(4, 16, False), place, layers, offers).decide(None)
    assert decision.name == chosen
    assert decision.cublas_s == 10.0
    for layer in layers:
        assert layer.ways == ((Way(place.rows, right),) if chosen == "right" else ())


def test_what_was_decided_before_is_taken_if_it_still_gives_the_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = Linear(16, 4, bias=False)
    torch.nn.init.normal_(layer.weight)

    def right(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    trial = Trial(Kind(4, 16, False), Place(range(3, 65), 64), [layer], {"right": right, "wrong": doubled})
    before = Decision("right", 2.0, 1.0)
    assert trial.decide(before) is before, "without timing anything: there is no GPU here"
    assert layer.ways == (Way(range(3, 65), right),)
    monkeypatch.setattr(product_choice, "median_s", lambda _calls: 1.0)
    assert trial.decide(Decision("wrong", 2.0, 1.0)).name == CUBLAS
    assert trial.decide(Decision("no more", 2.0, 1.0)).name == CUBLAS


def test_decisions_are_kept_for_the_same_gpu_and_shapes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(product_choice.cublaslt, "version", lambda: 130100)
    spots = [(DOWN, place) for place in product_choice.places(256)]

    def kept(dtype: torch.dtype = torch.bfloat16) -> product_choice.Kept:
        return product_choice.Kept(spots, dtype, torch.device("cpu"), alone=True)

    assert kept().decisions == [None] * len(spots)
    made = [Decision("a", 2e-6, 1e-6)] * len(spots)
    kept().put(made)
    assert kept().decisions == made
    assert kept(torch.float16).decisions == [None] * len(spots)


def test_the_weights_of_a_trial_leave_the_cache_before_they_come_again() -> None:
    layers = [Linear(4096, 4096, bias=False, device="meta", dtype=torch.bfloat16) for _ in range(2)]
    trial = Trial(Kind(4096, 4096, False), Place(range(65, 129), 128), layers, {})
    cold = trial._cold_layers()
    assert len(cold) * cold[0].weight.nbytes > 2 * 50e6
    assert cold[:4] == [*layers, *layers]


def test_tiles_compile_without_a_gpu_and_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    tiles = [Tile(128, 96, 2, 2), Tile(128, 224, 1, 2, gated=True), MANY]
    made = hopper.binaries(tiles, torch.bfloat16)
    assert all(binary.startswith(b"\x7fELF") for binary in made.values())
    assert b"few_rows" in made[tiles[0]]
    assert b"many_rows" in made[MANY]
    monkeypatch.setattr(hopper.cuda, "compile_sources", lambda *_: pytest.fail("they were compiled before"))
    assert hopper.binaries(tiles, torch.bfloat16) == made


def test_a_kernel_that_does_not_compile_is_an_error_with_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)sm_90a.*undeclared_thing"):
        hopper.cuda.compile_sources(["int x = undeclared_thing;"], "sm_90a")


def test_where_nothing_compiles_cublas_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    spec = SimpleNamespace(multi_processor_count=PROCESSORS, name="a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: spec)
    monkeypatch.setattr(hopper, "binaries", refuse)
    monkeypatch.setattr(product_choice.cublaslt, "version", lambda: 130100)
    layer = Linear(2048, 2048, bias=False, dtype=torch.bfloat16)
    choice = choose(layer, 8192, torch.bfloat16, torch.device("cpu"), alone=True)
    assert choice.path == CUBLAS
    assert "libnvrtc" in choice.reason
    assert layer.ways == ()
    older = pytest.MonkeyPatch()
    older.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    assert "9.0" in choose(layer, 8192, torch.bfloat16, torch.device("cpu"), alone=True).reason
    older.undo()
