"""Of Hopper's kernel of 4-bit weights what needs no GPU: that it compiles, which tile rows have, how blocks share."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch

from cluster.collectives import cuda
from orchestrator.engine.kernels import four_bits, hopper
from orchestrator.engine.kernels import four_bits_hopper as kernel
from orchestrator.engine.kernels.quantized import rows_by_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (4096, 7168), (128256, 4096)]
SMALL = [(1544, 640), (1544, 2560), (16, 128)]


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is there for Linux and Windows alone")
@pytest.mark.parametrize(
    ("rows", "gated", "group", "dtype", "scales"), [(24, False, 64, FP16, FP32), (97, True, 128, BF16, BF16)]
)
def test_it_compiles(rows: int, gated: bool, group: int, dtype: torch.dtype, scales: torch.dtype) -> None:
    text = kernel.source(kernel.choose(rows, gated=gated), group, dtype, scales)
    assert cuda.compile_source(text, hopper.ARCHITECTURE, {}).startswith(b"\x7fELF")


def test_every_number_of_rows_has_the_smallest_tile_with_room_for_it() -> None:
    tiles = [kernel.choose(m, gated=False) for m in range(kernel.FEWEST_ROWS, hopper.MOST_ROWS + 1)]
    for m, tile in enumerate(tiles, kernel.FEWEST_ROWS):
        assert m <= tile.rows < m + 32
        assert tile.shared_bytes <= hopper.SHARED_BYTES
        assert tile.stages >= 3
        assert tile.rows * 128 % 1024 == 0  # a stage, as it is swizzled


@pytest.mark.parametrize(("n", "k"), [*SHAPES, *SMALL])
def test_blocks_have_about_as_many_chunks_each_and_none_has_none(n: int, k: int) -> None:
    chunks = -(-n // kernel.CHANNELS) * (k // kernel.CHUNK)
    blocks = kernel.blocks_of(n, k)
    assert 1 <= blocks <= min(chunks, four_bits.PROCESSORS)
    begins = [block * chunks // blocks for block in range(blocks + 1)]  # as the kernel has it
    own = [end - begin for begin, end in pairwise(begins)]
    assert min(own) >= 1
    assert (n, k) in SMALL or max(own) <= 1.25 * chunks / four_bits.PROCESSORS + 1


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_tile_are_even_where_that_takes_no_longer(parts: int) -> None:
    tiles = four_bits.PROCESSORS // parts
    assert kernel.blocks_of(tiles * kernel.CHANNELS, 8192) == tiles * parts


def test_others_have_their_kernels() -> None:
    x, scales = torch.zeros(64, 256, dtype=BF16), torch.zeros(128, 2, 2, dtype=BF16)
    assert not kernel.takes(x, 128, scales, 128)  # not on a CPU
    assert rows_by_kernel(x, torch.zeros(128, 128, dtype=torch.uint8), scales, 128) == [
        1,
        2,
        3,
        9,
        17,
        33,
        65,
    ]


def test_a_hopper_has_a_kernel_for_every_32_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "fits", lambda *_: True)
    x, scales = torch.zeros(64, 256, dtype=BF16), torch.zeros(128, 2, 2, dtype=BF16)
    first = rows_by_kernel(x, torch.zeros(128, 128, dtype=torch.uint8), scales, 128)
    tiles = [kernel.choose(m, gated=True) for m in first if m >= kernel.FEWEST_ROWS]
    assert {tile.rows for tile in tiles} == set(kernel.ROWS)
    assert not kernel.takes(x[: kernel.FEWEST_ROWS - 1], 128, scales, 128)
    assert kernel.takes(x[: kernel.FEWEST_ROWS], 128, scales, 128)
