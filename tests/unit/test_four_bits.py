"""Of the kernels of 4-bit weights what needs no GPU: that they compile for all that are named, and what is chosen."""

from __future__ import annotations

import sys

import pytest
import torch

from cluster.collectives import cuda
from orchestrator.engine.kernels import four_bits
from orchestrator.engine.kernels.four_bits import (
    GATED,
    MANY_CHANNELS,
    TENS,
    Few,
    Tens,
    choose_few,
    choose_tens,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALLEST_SHARED_BYTES = 99 * 1024  # that a block may have, of sm_86 and sm_89


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is there for Linux and Windows alone")
@pytest.mark.parametrize(
    ("architecture", "tile", "group", "dtype", "scales"),
    [
        ("sm_80", TENS[16], 64, FP16, FP16),
        ("sm_86", MANY_CHANNELS, 32, FP16, FP32),
        ("sm_89", TENS[16], 32, BF16, FP32),
        ("sm_90", GATED, 128, BF16, BF16),
    ],
)
def test_it_compiles(
    architecture: str, tile: Few | Tens, group: int, dtype: torch.dtype, scales: torch.dtype
) -> None:
    text = four_bits.source(tile, group, dtype, scales, tile is GATED)
    assert cuda.compile_source(text, architecture, {}).startswith(b"\x7fELF")


def test_every_number_of_rows_has_a_tile_with_room_for_it() -> None:
    for rows in range(four_bits.FEW_ROWS + 1, four_bits.MOST_ROWS + 1):
        tile = choose_tens(rows)
        assert rows <= 8 * tile.rows
        assert tile.shared_bytes <= SMALLEST_SHARED_BYTES


@pytest.mark.parametrize("tile", TENS.values(), ids=str)
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (28672, 4096), (4096, 14336), (48, 128), (1024, 256)])
def test_parts_of_the_columns_have_two_chunks_and_keep_an_h100_busy(tile: Tens, n: int, k: int) -> None:
    splits = tile.splits(n, k)
    assert splits == 1 or k // four_bits.CHUNK >= 2 * splits
    assert splits == 1 or tile.blocks_of(n) * splits <= four_bits.PROCESSORS * tile.blocks


def test_few_channels_have_more_warps_on_them() -> None:
    assert choose_few(4096, gated=False).warps > choose_few(6144, gated=False).warps
    assert choose_few(28672, gated=True) is GATED
    assert not four_bits.takes(torch.zeros(1, 256), torch.zeros(8, 2, 2), 128)  # not on a CPU
