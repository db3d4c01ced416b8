"""Tensor and pipeline splits: nothing lost, nothing twice, none empty, none slower than it must be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadLayout
from strategies.pipeline import shard_replica, split_layers
from strategies.plan import ParallelDims
from strategies.spec import ModelSpec, RopeSpec
from strategies.tensor import local_spec, pieces, split_heads


def spec(*, heads: int = 9, kv_heads: int = 3, layers: int = 6, tied: bool = True) -> ModelSpec:
    return ModelSpec(
        name="tiny",
        family="llama",
        layers=layers,
        hidden=heads * 8,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=8,
        intermediate=50,
        vocab=131,
        max_positions=256,
        rms_eps=1e-5,
        rope=RopeSpec(),
        tied=tied,
    )


@pytest.mark.parametrize("name", ["tp1", "tp2", "pp3", "dp2", "tp2pp2", "tp2dp2", "tp2pp2dp2"])
def test_layout_names_round_trip(name: str) -> None:
    assert ParallelDims.parse(name).name == name
    assert ParallelDims.parse(name.upper()).name == name


@pytest.mark.parametrize("name", ["", "tp", "tp0", "2tp", "tp2tp2", "tp2x", "zp2", "tp2+int4", "tp-1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(BadLayout):
        ParallelDims.parse(name)


@given(kv_heads=st.integers(1, 8), group=st.integers(1, 4), data=st.data())
def test_heads_are_split_whole(kv_heads: int, group: int, data: st.DataObject) -> None:
    model = spec(heads=kv_heads * group, kv_heads=kv_heads)
    tp = data.draw(st.integers(1, model.heads))
    parts = split_heads(model, tp)
    assert [h for heads, _ in parts for h in heads] == list(range(model.heads))
    for heads, kv in parts:
        assert len(heads) > 0
        assert {h // group for h in heads} == set(kv)
        assert len(heads) % len(kv) == 0, "a rank's query heads share its KV heads evenly"


def test_smollm2s_nine_heads_over_two_ranks() -> None:
    assert split_heads(spec(), 2) == [(range(0, 6), range(0, 2)), (range(6, 9), range(2, 3))]


def test_more_ranks_than_kv_heads_share_them() -> None:
    assert [kv for _, kv in split_heads(spec(), 4)] == [range(0, 1), range(0, 1), range(1, 2), range(2, 3)]


def test_more_ranks_than_heads_are_refused_with_the_way_out() -> None:
    with pytest.raises(BadLayout, match=r"tp=10 exceeds the 9 attention heads .* tp9"):
        split_heads(spec(), 10)


@given(
    layers=st.integers(1, 24),
    head=st.floats(0, 6),
    first=st.floats(0, 2),
    speeds=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=1, max_size=4),
)
def test_layers_are_split_as_well_as_any_split_can(
    layers: int, head: float, first: float, speeds: list[float]
) -> None:
    stages = len(speeds)
    if stages > layers:
        with pytest.raises(BadLayout):
            split_layers(layers, head, first, speeds=speeds)
        return

    def slowest(bounds: tuple[int, ...]) -> float:
        counts = [b - a for a, b in pairwise((0, *bounds, layers))]
        extra = [(first if i == 0 else 0) + (head if i == stages - 1 else 0) for i in range(stages)]
        return max((n + e) / s for n, e, s in zip(counts, extra, speeds, strict=True))

    split = split_layers(layers, head, first, speeds=speeds)
    assert [layer for part in split for layer in part] == list(range(layers))
    assert all(len(part) for part in split)
    best = min(slowest(bounds) for bounds in combinations(range(1, layers), stages - 1))
    assert slowest(tuple(part.stop for part in split[:-1])) == pytest.approx(best)


def test_the_head_takes_layers_off_the_last_stage() -> None:
    assert [len(part) for part in split_layers(30, 8.0, speeds=[1, 1])] == [19, 11]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["tp1", "tp2", "tp3", "pp2", "tp2pp3"])
def test_the_pieces_of_all_ranks_are_the_model(name: str, tied: bool) -> None:
    model = spec(tied=tied)
    dims = ParallelDims.parse(name)
    sizes: dict[str, int] = {}
    for shard in shard_replica(model, dims):
        local = local_spec(model, shard)
        for parts in pieces(model, shard).values():
            for piece in parts:
                split = piece.rows or piece.cols
                if split is not None:
                    sizes[piece.name] = sizes.get(piece.name, 0) + len(split)
        assert local.layers == len(shard.layers)
    tables = 2 if tied and dims.pp > 1 else 1
    assert sizes.pop("model.embed_tokens.weight") == model.vocab * tables
    if not tied:
        assert sizes.pop("lm_head.weight") == model.vocab
    width = {"q": 72, "k": 24, "v": 24, "o": 72, "gate": 50, "up": 50, "down": 50}
    assert sizes == {
        f"model.layers.{i}.{part}.{p}_proj.weight": width[p]
        for i in range(model.layers)
        for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for p in names
    }
