"""The Triton attention kernels, interpreted on the CPU, against plain softmax attention in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.engine.kernels.attention import (
    Tile,
    choose_splits,
    decode_attention,
    decode_tile,
    prefill_attention,
    prefill_tile,
)
from orchestrator.engine.told import Block, blocks_of
from orchestrator.step import Row
from tests.interpreted import *  # noqa: F403

BLOCK_SIZE = 16
SMALL = Tile(keys=16, rows=16, warps=4, stages=2)


@dataclass(frozen=True)
class Cache:
    """A cache whose rows are nan except where a slot's positions lie; slots' blocks are shuffled."""

    keys: Tensor
    values: Tensor
    tables: Tensor

    @classmethod
    def filled(
        cls, lengths: Sequence[int], kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
    ) -> Cache:
        blocks_each = -(-max(lengths) // BLOCK_SIZE)
        blocks = len(lengths) * blocks_each
        tables = torch.randperm(blocks).view(len(lengths), blocks_each).to(torch.int32)
        keys, values = torch.full((2, blocks * BLOCK_SIZE, kv_heads, head_dim), torch.nan, dtype=dtype)
        cache = cls(keys, values, tables)
        for slot, length in enumerate(lengths):
            rows = cache.rows(slot, length)
            keys[rows] = torch.randn(length, kv_heads, head_dim).to(dtype)
            values[rows] = torch.randn(length, kv_heads, head_dim).to(dtype)
        return cache

    def rows(self, slot: int, length: int) -> Tensor:
        place = torch.arange(length)
        return self.tables[slot, place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE

    def attend(self, q_HD: Tensor, slot: int, position: int, scale: float, window: int | None) -> Tensor:
        """One query's attention, in float64: [H, D]."""
        first = 0 if window is None else max(0, position - window + 1)
        rows = self.rows(slot, position + 1)[first:]
        group = len(q_HD) // self.keys.shape[1]
        k_LHD, v_LHD = (x[rows].double().repeat_interleave(group, 1) for x in (self.keys, self.values))
        weights_HL = torch.einsum("hd,lhd->hl", q_HD.double() * scale, k_LHD).softmax(-1)
        return torch.einsum("hl,lhd->hd", weights_HL, v_LHD)


def strided_queries(tokens: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A view into a wider product, as the query part of qkv is."""
    return torch.randn(tokens, heads + 2, head_dim).to(dtype)[:, :heads]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


def decode_error(
    cache: Cache,
    q_BHD: Tensor,
    slots: Sequence[int],
    positions: Sequence[int],
    *,
    window: int | None = None,
    splits: int = 1,
    tile: Tile | None = None,
) -> float:
    scale = q_BHD.shape[2] ** -0.5
    out = decode_attention(
        q_BHD,
        cache.keys,
        cache.values,
        cache.tables,
        ints(*slots),
        ints(*positions),
        block_size=BLOCK_SIZE,
        scale=scale,
        window=window,
        splits=splits,
        tile=tile,
        out=torch.full(q_BHD.shape, torch.nan, dtype=q_BHD.dtype),
    )
    rows = zip(q_BHD, slots, positions, strict=True)
    return relative_error(out, torch.stack([cache.attend(*row, scale, window) for row in rows]))


def prefill_error(
    cache: Cache,
    starts: Sequence[int],
    counts: Sequence[int],
    group: int,
    *,
    window: int | None = None,
    tile: Tile | None = None,
    scale: float = 0.3,
    empty_rows: int | None = None,
) -> float:
    """Rows are the cache's slots in reverse order. `empty_rows`: so many behind them, and blocks told by the host."""
    kv_heads, head_dim = cache.keys.shape[1:]
    q_THD = strided_queries(sum(counts), kv_heads * group, head_dim, cache.keys.dtype)
    slots = list(reversed(range(len(counts))))
    offsets, beyond = [0, *torch.tensor(counts).cumsum(0).tolist()], [0] * (empty_rows or 0)
    block = Block((tile or prefill_tile(head_dim, q_THD.dtype, hopper=False)).rows, group)
    flat = blocks_of(
        [Row(0, start, count, False, 0, -1) for start, count in zip(starts, counts, strict=True)], block
    )
    padded = [ints(*flat[0].tolist(), -1, -1), ints(*flat[1].tolist(), 0, 0)]
    out = prefill_attention(
        q_THD,
        cache.keys,
        cache.values,
        cache.tables,
        ints(*slots, *beyond),
        ints(*starts, *beyond),
        ints(*offsets, *[offsets[-1] for _ in beyond]),
        longest=max(counts) if empty_rows is None else None,
        blocks=None if empty_rows is None else (padded[0], padded[1]),
        block_size=BLOCK_SIZE,
        scale=scale,
        window=window,
        tile=tile,
        out=torch.full(q_THD.shape, torch.nan, dtype=q_THD.dtype),
    )
    places = [
        (slot, start + i)
        for slot, start, count in zip(slots, starts, counts, strict=True)
        for i in range(count)
    ]
    queries = zip(q_THD, places, strict=True)
    return relative_error(out, torch.stack([cache.attend(q, *place, scale, window) for q, place in queries]))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (3, 3), (2, 4), (1, 7), (1, 20)])
def test_decode_in_every_grouping_and_split(kv_heads: int, group: int, splits: int) -> None:
    lengths = [1, 37, 120]
    cache = Cache.filled(lengths, kv_heads, 32)
    q_BHD = strided_queries(3, kv_heads * group, 32)
    tile = Tile(keys=16, rows=decode_tile(group, 32, torch.float32, splits).rows, warps=4, stages=2)
    assert decode_error(cache, q_BHD, [2, 0, 1], [119, 0, 36], splits=splits, tile=tile) < 2e-6


@pytest.mark.parametrize("head_dim", [16, 80, 96, 256])
@pytest.mark.parametrize("splits", [1, 2])
def test_decode_of_every_head_size(head_dim: int, splits: int) -> None:
    cache = Cache.filled([70, 129], 2, head_dim)
    assert decode_error(cache, strided_queries(2, 4, head_dim), [1, 0], [128, 69], splits=splits) < 2e-6


@pytest.mark.parametrize("window", [1, 16, 23, 500])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("position", [15, 60])
def test_decode_sees_its_window_alone(window: int, splits: int, position: int) -> None:
    cache = Cache.filled([position + 1], 1, 16)
    if window <= position:  # what lies before the window may have been handed to someone else
        cache.keys[cache.rows(0, position - window + 1)] = torch.nan
        cache.values[cache.rows(0, position - window + 1)] = torch.nan
    q_BHD = strided_queries(1, 2, 16)
    assert decode_error(cache, q_BHD, [0], [position], window=window, splits=splits, tile=SMALL) < 2e-6


def test_float16_errs_by_its_rounding() -> None:
    cache = Cache.filled([90, 33], 2, 64, torch.float16)
    queries = strided_queries(2, 6, 64, torch.float16)
    assert decode_error(cache, queries, [0, 1], [89, 32], splits=2) < torch.finfo(torch.float16).eps
    assert prefill_error(cache, [0, 40], [33, 50], 3) < torch.finfo(torch.float16).eps


def test_a_padded_batch_leaves_real_rows_as_they_are() -> None:
    cache = Cache.filled([100, 1], 2, 32)
    q_BHD = strided_queries(5, 4, 32)
    arguments = {"block_size": BLOCK_SIZE, "scale": 0.2, "window": None, "splits": 4, "tile": SMALL}
    alone, padded = (
        decode_attention(
            q_BHD[:rows],
            cache.keys,
            cache.values,
            cache.tables,
            ints(0, 1, 1, 1, 1),
            ints(99, 0, 0, 0, 0),
            **arguments,  # type: ignore[arg-type]
        )
        for rows in (1, 5)
    )
    assert torch.equal(alone[0], padded[0])
    assert not padded.isnan().any()


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (3, 3), (1, 4), (1, 7)])
@pytest.mark.parametrize("starts", [(0, 0, 0), (32, 5, 15)])
def test_prefill_in_every_grouping(kv_heads: int, group: int, starts: tuple[int, ...]) -> None:
    counts = [1, 21, 9]
    lengths = [start + count for start, count in zip(starts, counts, strict=True)]
    cache = Cache.filled(lengths[::-1], kv_heads, 16)
    assert prefill_error(cache, starts, counts, group, tile=SMALL) < 2e-6


@pytest.mark.parametrize(("group", "empty_rows"), [(1, 1), (4, 5), (7, 1)])
def test_prefill_whose_blocks_are_counted_over_all_rows(group: int, empty_rows: int) -> None:
    """As in graphs, which are made before anybody knows how the tokens will fall to the rows."""
    counts, starts = [1, 37, 9], [30, 0, 5]
    cache = Cache.filled([start + count for start, count in zip(starts, counts, strict=True)][::-1], 2, 16)
    assert prefill_error(cache, starts, counts, group, tile=SMALL, empty_rows=empty_rows) < 2e-6


@pytest.mark.parametrize("head_dim", [80, 128, 256])
def test_prefill_of_every_head_size(head_dim: int) -> None:
    cache = Cache.filled([45, 41], 1, head_dim)
    assert prefill_error(cache, [0, 5], [41, 40], 2) < 2e-6


@pytest.mark.parametrize("window", [1, 16, 23, 500])
@pytest.mark.parametrize("start", [0, 40])
def test_prefill_sees_its_window_alone(window: int, start: int) -> None:
    cache = Cache.filled([start + 30], 1, 16)
    if window <= start:
        cache.keys[cache.rows(0, start - window + 1)] = torch.nan
        cache.values[cache.rows(0, start - window + 1)] = torch.nan
    assert prefill_error(cache, [start], [30], 2, window=window, tile=SMALL) < 2e-6


def test_prefill_with_tiles_of_many_queries() -> None:
    cache = Cache.filled([160], 1, 16)
    tile = Tile(keys=32, rows=128, warps=4, stages=2)
    assert prefill_error(cache, [70], [90], 4, tile=tile) < 2e-6
    assert prefill_error(cache, [70], [90], 4, window=80, tile=tile) < 2e-6


def test_prefill_of_windows_longer_than_a_tile_by_a_group_that_does_not_divide_it() -> None:
    """A tile's 19 queries of 7 heads: the first keys that it reads lie before the windows of most of them."""
    cache = Cache.filled([465, 300], 2, 80, torch.float16)
    tile = prefill_tile(80, torch.float16, hopper=True)
    error = prefill_error(cache, [0, 400], [300, 65], 7, window=128, tile=tile, scale=80**-0.5)
    assert error < torch.finfo(torch.float16).eps


@pytest.mark.parametrize("scale", [head_dim**-0.5 for head_dim in (16, 32, 64, 80, 96, 112, 128, 256)])
def test_a_query_that_sees_nothing_of_the_first_keys_forgets_them_at_any_scale(scale: float) -> None:
    cache = Cache.filled([48], 1, 16)
    assert prefill_error(cache, [0], [48], 1, window=8, tile=SMALL, scale=scale) < 2e-6


@settings(max_examples=18, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 60),
    group=st.sampled_from([1, 2, 3, 5, 7, 20]),
    tile_keys=st.sampled_from([16, 32, 64]),
    tile_rows=st.sampled_from([16, 64, 128]),
    scale=st.floats(0.0625, 2.0),
)
def test_prefill_of_any_rows_windows_groups_and_scales(
    rows: list[tuple[int, int]],
    window: int | None,
    group: int,
    tile_keys: int,
    tile_rows: int,
    scale: float,
) -> None:
    starts, counts = zip(*rows, strict=True)
    cache = Cache.filled([start + count for start, count in rows][::-1], 1, 24)
    tile = Tile(keys=tile_keys, rows=tile_rows, warps=4, stages=2)
    assert prefill_error(cache, starts, counts, group, window=window, tile=tile, scale=scale) < 3e-6


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    positions=st.lists(st.integers(0, 100), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 120),
    group=st.sampled_from([1, 3, 7, 20]),
    tile_keys=st.sampled_from([16, 32, 64]),
    splits=st.integers(1, 12),
)
def test_decode_at_any_positions_windows_groups_and_splits(
    positions: list[int], window: int | None, group: int, tile_keys: int, splits: int
) -> None:
    cache = Cache.filled([position + 1 for position in positions], 2, 24)
    tile = Tile(keys=tile_keys, rows=decode_tile(group, 24, torch.float32, splits).rows, warps=4, stages=2)
    q_BHD = strided_queries(len(positions), 2 * group, 24)
    slots = range(len(positions))
    assert decode_error(cache, q_BHD, slots, positions, window=window, splits=splits, tile=tile) < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
def test_default_tiles_fit_the_shared_memory_of_an_ampere_card(head_dim: int, dtype: torch.dtype) -> None:
    """99 KiB a program on sm_86 and sm_89: K and V of all stages but one, and the queries."""
    head_pad = 1 << (head_dim - 1).bit_length()
    for tile in (decode_tile(4, head_dim, dtype, splits=1), prefill_tile(head_dim, dtype, hopper=False)):
        in_flight = 2 * tile.keys * (tile.stages - 1)
        assert (in_flight + tile.rows) * head_pad * dtype.itemsize <= 99 * 1024


def test_splits_fill_the_card_and_no_more() -> None:
    by_rows = [choose_splits(rows, 8, 8192, 132) for rows in (1, 4, 8, 16, 32, 256, 512)]
    assert by_rows == [32, 16, 8, 1, 1, 1, 1]  # as measured best, or within 3 % of it
    assert choose_splits(rows=1, kv_heads=8, longest_tokens=1, sm_count=132) == 1
    assert choose_splits(rows=1, kv_heads=8, longest_tokens=600, sm_count=132) == 19
    by_kv_heads = [choose_splits(1, kv_heads, 100_000, 132) for kv_heads in (1, 2, 4, 8)]
    assert by_kv_heads == [64, 64, 33, 32]  # a rank's, of 8 over 8, 4, 2 and 1
