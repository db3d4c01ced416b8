"""The limits that a deployment's memory leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.errors import BadLayout
from launch.options import EngineOptions
from launch.start import limits_for
from strategies.plan import ParallelDims
from strategies.source import ModelSource, SourceKind
from tests.unit.machines import SMOL

OPTIONS = EngineOptions(
    source=ModelSource("smol", None, SourceKind.BUILTIN),
    spec=SMOL,  # 8192 positions
    device="cpu",
    dtype="float32",
    dummy_weights=True,
    max_model_len=None,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    block_size=16,
    num_blocks=None,
    prefix_caching=True,
    seed=0,
    address=None,
    peer_access=True,
)
ONE = ParallelDims()


def test_the_context_is_the_models_where_it_fits() -> None:
    limits = limits_for(10_000, ONE, OPTIONS)
    assert limits.max_model_len == 8192
    assert limits.num_blocks == 4 * 512  # more than four sequences fill is of no use


def test_the_context_is_what_fits_where_that_is_less() -> None:
    limits = limits_for(40, ONE, OPTIONS)
    assert (limits.max_model_len, limits.num_blocks) == (640, 40)


def test_a_context_asked_for_is_what_there_is_room_for() -> None:
    limits = limits_for(40, ONE, replace(OPTIONS, max_model_len=100))
    assert (limits.max_model_len, limits.num_blocks) == (100, 4 * 7)  # of 7 blocks each, the last not full


def test_fewer_blocks_may_be_asked_for_but_no_more_than_fit() -> None:
    assert limits_for(100, ONE, replace(OPTIONS, num_blocks=33)).num_blocks == 33
    assert limits_for(100, ONE, replace(OPTIONS, num_blocks=500)).num_blocks == 100


def test_as_many_batches_in_flight_as_stages() -> None:
    assert limits_for(100, ParallelDims(tp=2, pp=3), OPTIONS).groups == 3


@pytest.mark.parametrize(
    ("blocks", "asked", "says"),
    [
        (31, None, "tp2: 496 KV tokens fit beside the weights, fewer than a context of 512"),
        (40, 641, "tp2: 640 KV tokens fit beside the weights, fewer than a context of 641"),
        (0, None, "tp2: 0 KV tokens fit"),
    ],
)
def test_a_context_that_does_not_fit(blocks: int, asked: int | None, says: str) -> None:
    with pytest.raises(BadLayout, match=says):
        limits_for(blocks, ParallelDims(tp=2), replace(OPTIONS, max_model_len=asked))
