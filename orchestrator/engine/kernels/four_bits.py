"""Up to 128 rows times weights in 4 bits by tensor cores (four_bits.cu, four_bits_few.cu), on any GPU from sm_80 on.

Dimensions: M rows of x, N output channels, K columns.
"""

from __future__ import annotations

from ctypes import c_int, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from cluster.collectives import cuda
from orchestrator.engine.kernels.compiled import binaries
from orchestrator.engine.kernels.quantized_dot import added

FEW_ROWS, MOST_ROWS = 8, 128
CHUNK = 128  # columns that a warp takes at a time
FILES = ("codes.cu", "four_bits_parts.cu", "four_bits.cu")
_PART_ROW_BYTES = 80  # of four_bits_few.cu
PROCESSORS = 132
"""An H100's, which blocks are to keep busy. Not the GPU's own number: sums are alike on all GPUs."""


@dataclass(frozen=True, slots=True)
class Few:
    """Of a warp: 16s of channels; warps that share a block's columns; blocks at once on a processor."""

    channels: int
    warps: int
    blocks: int
    files: ClassVar = FILES
    shared_bytes: ClassVar = 0

    @property
    def sizes(self) -> dict[str, int]:
        return {"TENS": 0, "MT": self.channels, "WARPS": self.warps, "BLOCKS": self.blocks}

    def blocks_of(self, n: int) -> int:
        return -(-n // (16 * self.channels))


@dataclass(frozen=True, slots=True)
class Many:
    """Of few rows and many channels: chunks that a warp keeps x of; warps of a block, beside each other in K."""

    chunks: int
    warps: int
    blocks: int
    is_even: bool  # its slabs fill K
    has_vectors: bool  # four pairs of scales are 16 bytes that lie aligned
    is_gated: bool
    files: ClassVar = ("codes.cu", "four_bits_parts.cu", "four_bits_few.cu")

    @property
    def sizes(self) -> dict[str, int]:
        return {
            **{"C": self.chunks, "WARPS": self.warps, "BLOCKS": self.blocks, "TILES": self.tiles},
            **{"EVEN": int(self.is_even), "VECTOR": int(self.has_vectors), "GATED": int(self.is_gated)},
        }

    @property
    def tiles(self) -> int:
        """Whose sums are in shared memory."""
        return max(2, min(8, 64 // self.warps))

    @property
    def shared_bytes(self) -> int:
        return self.tiles * self.warps * FEW_ROWS * _PART_ROW_BYTES

    def blocks_of(self, n: int) -> int:
        tiles = -(-n // 2 // 8) if self.is_gated else -(-n // 16)
        return min(tiles, PROCESSORS * self.blocks)


@dataclass(frozen=True, slots=True)
class Tens:
    """Of a warp: 16s of channels, 8s of rows; warps of a block, beside each other; blocks at once on a processor."""

    channels: int
    rows: int
    warps: int
    blocks: int
    files: ClassVar = FILES

    @property
    def sizes(self) -> dict[str, int]:
        return {
            **{"TENS": 1, "MT": self.channels, "NT": self.rows},
            **{"WARPS": self.warps, "BLOCKS": self.blocks},
        }

    @property
    def shared_bytes(self) -> int:
        return 2 * self.rows * 8 * CHUNK * 2

    def blocks_of(self, n: int) -> int:
        return -(-n // (16 * self.channels * self.warps))

    def splits(self, n: int, k: int) -> int:
        """Parts of the columns, of two chunks at least."""
        return max(1, min(PROCESSORS * self.blocks // self.blocks_of(n), k // CHUNK // 2))


FEW_CHANNELS = Few(2, 16, 1)
MOST_OF_FEW = (
    PROCESSORS * 16 * FEW_CHANNELS.channels
)  # of channels: beyond, there is more than a block a processor
_MANY_CHUNKS, _MANY_WARPS = 4, 8
"""The fastest over a layer of a tp2 rank of Llama-3.3-70B of 15 ways (H100 SXM, 2026-11-23), in µs: of 1 and 8 rows 92
and 100, before 109 and 120; the bytes alone 75. Of Llama-3.1-8B gate-up 23.1 (26.6) and qkv 6.7 (7.6); o and down, of
few channels, lose by it (5.7 and 15.3; as they go 5.0 and 14.2). A warp that brings codes by bulk copies is as fast."""
TENS = {16: Tens(2, 2, 8, 2), 32: Tens(4, 4, 4, 2), 64: Tens(2, 8, 4, 2), 128: Tens(2, 16, 8, 1)}
"""The fastest over a layer of Llama-3.1-8B of those tried (H100 SXM, 2026-11-22), in µs: of 1, 8, 16, 32, 64, 128 rows
55, 61, 77, 93, 138, 223; Triton's kernels 69, 114, 122, 126, 161, 239; bf16 by cuBLAS 148, 169, 170, 171, 174, 182.
Tried and dropped: codes by cp.async through shared memory (57 for one row, 254 for 128), x read a chunk ahead."""


def choose_few(n: int, k: int, group: int, *, wide_scales: bool, gated: bool) -> Few | Many:
    """Of many channels a warp keeps x and takes one tile after another; of few, blocks have what they can get."""
    if not gated and n <= MOST_OF_FEW:
        return FEW_CHANNELS
    chunks = k // CHUNK
    own = _MANY_CHUNKS if chunks >= _MANY_CHUNKS else 1
    slabs = -(-chunks // (_MANY_WARPS * own))
    warps = -(-chunks // (slabs * own))  # so that few of the last slab's are idle
    return Many(
        own,
        warps,
        _MANY_WARPS // warps,
        is_even=chunks % (warps * own) == 0,
        has_vectors=own == 4 and group == CHUNK and not wide_scales and chunks % 4 == 0,
        is_gated=gated,
    )


def choose_tens(rows: int) -> Tens:
    return TENS[max(16, 1 << (rows - 1).bit_length())]


def takes(x_MK: Tensor, scales: Tensor, group: int) -> bool:
    if torch.version.cuda is None or not x_MK.is_cuda or group not in (32, 64, 128):
        return False
    if len(x_MK) > MOST_ROWS or x_MK.shape[1] % CHUNK:
        return False
    fits = x_MK.dtype in (torch.float16, torch.bfloat16) and scales.dtype in (x_MK.dtype, torch.float32)
    return fits and torch.cuda.get_device_capability(x_MK.device) >= (8, 0)


def few_rows(
    x_MK: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias_N: Tensor | None,
    group: int,
    *,
    gated: bool = False,
    pdl: bool = False,
) -> Tensor:
    """x @ weight.T + bias → [M, N], or SiLU(gate) × up → [M, N / 2]: in float32, rounded once. Contiguous tensors."""
    m, k = x_MK.shape
    n = len(codes)
    tile = choose_few(n, k, group, wide_scales=scales.dtype == torch.float32, gated=gated)
    outputs = n // 2 if gated else n
    out = torch.empty((m, outputs), dtype=x_MK.dtype, device=x_MK.device)
    kernel = _kernel(tile, group, x_MK.dtype, scales.dtype, x_MK.device)
    kernel.launch(
        tile.blocks_of(n), 32 * tile.warps, _stream(), *_pointers(codes, scales, x_MK, bias_N, out),
        c_int(m), c_int(n), c_int(k), overlap=pdl,
    )  # fmt: skip
    return out


def tens_of_rows(
    x_MK: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias_N: Tensor | None,
    group: int,
    *,
    pdl: bool = False,
) -> Tensor:
    """x @ weight.T + bias → [M, N], the weights rounded to x's dtype, summed in float32. Contiguous tensors."""
    m, k = x_MK.shape
    n = len(codes)
    tile = choose_tens(m)
    splits = tile.splits(n, k)
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    parts = torch.empty((splits, m, n) if splits > 1 else 0, dtype=torch.float32, device=x_MK.device)
    kernel = _kernel(tile, group, x_MK.dtype, scales.dtype, x_MK.device)
    blocks = tile.blocks_of(n) * splits
    kernel.launch(
        blocks, 32 * tile.warps, _stream(), *_pointers(codes, scales, x_MK, bias_N, out, parts),
        c_int(m), c_int(n), c_int(k), c_int(splits), overlap=pdl,
    )  # fmt: skip
    return added(parts, bias_N, out) if splits > 1 else out


def _stream() -> int:
    stream: int = torch.cuda.current_stream().cuda_stream
    return stream


def _pointers(*tensors: Tensor | None) -> list[c_void_p]:
    return [c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


@cache
def _kernel(
    tile: Few | Many | Tens, group: int, dtype: torch.dtype, scales: torch.dtype, device: torch.device
) -> cuda.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    text = source(tile, group, dtype, scales)
    module = cuda.load(binaries([text], f"sm_{major}{minor}")[0])
    return cuda.Kernel(module, "tens_of_rows" if isinstance(tile, Tens) else "few_rows", tile.shared_bytes)


def source(tile: Few | Many | Tens, group: int, dtype: torch.dtype, scales: torch.dtype) -> str:
    """The kernel's files, behind a tile's sizes."""
    sizes = {
        **tile.sizes,
        "GROUP": group,
        "IS_HALF": int(dtype == torch.float16),
        "WIDE_SCALES": int(scales == torch.float32),
    }
    return "".join(f"#define {name} {size}\n" for name, size in sizes.items()) + "".join(
        map(_text, tile.files)
    )


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text()
