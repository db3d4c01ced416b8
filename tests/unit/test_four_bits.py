"""Of the kernels of 4-bit weights what needs no GPU: that they compile for all that are named, and what is chosen."""

from __future__ import annotations

import sys
from ctypes import c_void_p
from typing import Any

import pytest
import torch

from cluster.collectives import cuda
from orchestrator.engine.kernels import four_bits
from orchestrator.engine.kernels.four_bits import TENS, Few, Tens, choose_few, choose_tens

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALLEST_SHARED_BYTES = 99 * 1024  # that a block may have, of sm_86 and sm_89


@pytest.mark.skipif(sys.platform != "linux", reason="NVRTC is there for Linux and Windows alone")
@pytest.mark.parametrize(
    ("architecture", "tile", "group", "dtype", "scales"),
    [
        ("sm_80", TENS[16], 64, FP16, FP16),
        ("sm_89", TENS[16], 32, BF16, FP32),
        ("sm_89", TENS[32], 32, BF16, FP16),
        ("sm_80", choose_few(640, 64, gated=True, wide_scales=False), 64, FP16, FP16),
        ("sm_86", choose_few(384, 32, gated=False, wide_scales=True), 32, FP16, FP32),
        ("sm_90", choose_few(4096, 128, gated=False, wide_scales=False), 128, BF16, BF16),
        ("sm_90", choose_few(4096, 32, gated=False, wide_scales=False), 32, BF16, FP16),
    ],
)
def test_it_compiles(
    architecture: str, tile: Few | Tens, group: int, dtype: torch.dtype, scales: torch.dtype
) -> None:
    text = four_bits.source(tile, group, dtype, scales)
    assert cuda.compile_source(text, architecture, {}).startswith(b"\x7fELF")


def test_every_number_of_rows_has_a_tile_with_room_for_it() -> None:
    for rows in range(four_bits.most_few_rows(32) + 1, four_bits.MOST_ROWS + 1):
        tile = choose_tens(rows)
        assert rows <= 8 * tile.rows
        assert tile.shared_bytes <= SMALLEST_SHARED_BYTES


@pytest.mark.parametrize("tile", TENS.values(), ids=str)
@pytest.mark.parametrize(("n", "k"), [(6144, 4096), (28672, 4096), (4096, 14336), (48, 128), (1024, 256)])
def test_parts_of_the_columns_have_two_chunks_and_keep_an_h100_busy(tile: Tens, n: int, k: int) -> None:
    splits = tile.splits(n, k)
    assert splits == 1 or k // four_bits.CHUNK >= 2 * splits
    assert splits == 1 or tile.blocks_of(n) * splits <= four_bits.PROCESSORS * tile.blocks


@pytest.mark.parametrize(
    ("shared_bytes", "at_once", "told"),
    [
        (88064, 1, {8: 88064, 9: 39}),
        (44032, 2, {8: 44032, 9: 39}),
        (88064, None, {8: 88064}),
        (227 * 1024, 2, {8: 227 * 1024, 9: 100}),
    ],
)
def test_a_kernel_leaves_l1_what_its_blocks_do_not_share(
    shared_bytes: int, at_once: int | None, told: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU with 228 KiB a processor, which is attribute 81 of a device."""
    found: dict[int, int] = {}

    def call(name: str, *arguments: Any) -> None:
        if name == "cuDeviceGetAttribute":
            assert arguments[1] == 81
            arguments[0]._obj.value = 228 * 1024
        if name == "cuFuncSetAttribute":
            found[arguments[1]] = arguments[2]

    monkeypatch.setattr(cuda, "_call", call)
    cuda.Kernel(c_void_p(), "few_rows", shared_bytes, at_once)
    assert found == told


def test_a_cpu_has_kernels_of_its_own() -> None:
    assert not four_bits.takes(torch.zeros(1, 256), torch.zeros(8, 2, 2), 128)


@pytest.mark.parametrize("k", [128, 384, 512, 640, 1024, 3584, 4096, 5120, 7168, 8192, 14336])
@pytest.mark.parametrize("group", [32, 128])
def test_warps_of_a_block_share_all_columns(k: int, group: int) -> None:
    tile = choose_few(k, group, gated=True, wide_scales=False)
    chunks, slab = k // four_bits.CHUNK, tile.warps * tile.chunks
    slabs = -(-chunks // slab)
    assert tile.chunks <= chunks
    assert tile.is_even == (slabs * slab == chunks)
    assert (
        slabs * slab - chunks < slabs * tile.chunks
    )  # no more than one warp is idle in all, or a part of each
    assert tile.has_vectors == (
        group == 128 and (tile.chunks, chunks % 4) == (4, 0)
    )  # 16 bytes of four pairs
    assert not choose_few(k, group, gated=True, wide_scales=True).has_vectors
    assert tile.shared_bytes * tile.blocks <= SMALLEST_SHARED_BYTES
    assert 5 <= tile.warps * tile.blocks <= 8
    for processors in (82, 132):
        assert [tile.blocks_of(n, processors) for n in (16, 57344)] == [1, processors * tile.blocks]
