"""Up to 128 rows times weights in 4 bits by tensor cores (four_bits_few.cu, four_bits_tens.cu), on GPUs from sm_80 on.

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
from orchestrator.engine.kernels.processors import processors
from orchestrator.engine.kernels.quantized_dot import added

MOST_ROWS = 128
CHUNK = 128  # columns that a warp takes at a time
COMMON = ("codes.cu", "four_bits_parts.cu")
PROCESSORS = 132
"""An H100's, which blocks are to keep busy. Not the GPU's own number: sums are alike on all GPUs. (Those of few rows
are however many blocks there are.)"""


@dataclass(frozen=True, slots=True)
class Few:
    """Chunks that a warp keeps x of; warps of a block, beside each other in K; blocks at once on a processor."""

    chunks: int
    warps: int
    blocks: int
    rows: int  # of x, at most
    gated: bool  # SiLU(gate) × up
    is_even: bool  # its slabs fill K
    has_vectors: bool  # four pairs of scales are 16 bytes that lie aligned
    file: ClassVar = "four_bits_few.cu"

    @property
    def sizes(self) -> dict[str, int]:
        return {
            **{"C": self.chunks, "WARPS": self.warps, "BLOCKS": self.blocks, "TILES": _TILES},
            **{"GATED": int(self.gated), "EVEN": int(self.is_even), "VECTOR": int(self.has_vectors)},
            "PART_ROW": _PART_ROW,
        }

    @property
    def shared_bytes(self) -> int:
        sums, columns = _TILES * _PART_ROW * 4, (self.chunks * CHUNK + 16) * 2
        return self.warps * self.rows * (sums + columns)

    def blocks_of(self, n: int, processors: int) -> int:
        """As many as run at once: one that had to wait for another would take as long again."""
        return min(-(-n // 16), processors * self.blocks)


@dataclass(frozen=True, slots=True)
class Tens:
    """Of a warp: 16s of channels, 8s of rows; warps of a block, beside each other; blocks at once on a processor."""

    channels: int
    rows: int
    warps: int
    blocks: int
    file: ClassVar = "four_bits_tens.cu"

    @property
    def sizes(self) -> dict[str, int]:
        return {"MT": self.channels, "NT": self.rows, "WARPS": self.warps, "BLOCKS": self.blocks}

    @property
    def shared_bytes(self) -> int:
        return 2 * self.rows * 8 * CHUNK * 2

    def blocks_of(self, n: int) -> int:
        return -(-n // (16 * self.channels * self.warps))

    def splits(self, n: int, k: int) -> int:
        """Parts of the columns, of two chunks at least."""
        return max(1, min(PROCESSORS * self.blocks // self.blocks_of(n), k // CHUNK // 2))


_SCALES = {torch.float32: 1, torch.float16: 2}  # that are not of x's type
_TILES = 4  # whose sums are in shared memory
_PART_ROW = 20  # floats of a row's sums there, so that a warp writes to all banks
_CHUNKS = 4  # that a warp keeps x of
_WARPS = 8  # that fit a processor
_WORTH = 1.2  # more busy warps pay for twice the blocks, which bring x twice as often
TENS = {16: Tens(2, 2, 8, 2), 32: Tens(4, 4, 4, 2), 64: Tens(2, 8, 4, 2), 128: Tens(2, 16, 8, 1)}
"""The fastest over a layer of Llama-3.1-8B of those tried (H100 SXM, 2026-11-22), in µs: of 16, 32, 64, 128 rows 77,
93, 138, 223; Triton's kernels 122, 126, 161, 239; bf16 by cuBLAS 170, 171, 174, 182. Tried and dropped: codes by
cp.async through shared memory (254 for 128), x read a chunk ahead."""


def most_few_rows(group: int) -> int:
    """An instruction's eight, for each of a chunk's groups."""
    return 8 * group // CHUNK


@cache
def choose_few(k: int, group: int, *, gated: bool, wide_scales: bool) -> Few:
    """As many warps as divide the columns best, in one block of a processor or in several.

    The fastest of those tried (H100 SXM, 2026-11-23). µs of one row, and of the bytes alone at 3.05 TB/s: Llama-3.1-8B
    6.7, 5.6, 24.0, 14.6 (4.4, 2.9, 20.5, 10.2); Llama-3.3-70B at tp2 11.8, 8.4, 48.0, 25.6 (7.3, 5.8, 40.9, 20.5).
    """
    chunks = k // CHUNK
    own = _CHUNKS if chunks >= _CHUNKS else 1
    slabs, smaller = -(-chunks // (_WARPS * own)), -(-chunks // (_WARPS // 2 * own))
    warps = -(-chunks // (slabs * own))  # so that few of the last slab's are idle
    if warps > _WARPS // 2 and 2 * slabs > _WORTH * smaller:
        warps = _WARPS // 2
    return Few(
        own,
        warps,
        _WARPS // warps,
        most_few_rows(group),
        gated=gated,
        is_even=chunks % (warps * own) == 0,
        has_vectors=own == 4 and group == CHUNK and not wide_scales and chunks % 4 == 0,
    )


def choose_tens(rows: int) -> Tens:
    return TENS[max(16, 1 << (rows - 1).bit_length())]


def takes(x_MK: Tensor, scales: Tensor, group: int) -> bool:
    if torch.version.cuda is None or not x_MK.is_cuda or group not in (32, 64, 128):
        return False
    if len(x_MK) > MOST_ROWS or x_MK.shape[1] % CHUNK:
        return False
    return has_kind(x_MK.dtype, scales.dtype) and torch.cuda.get_device_capability(x_MK.device) >= (8, 0)


def has_kind(dtype: torch.dtype, scales: torch.dtype) -> bool:
    """Whether kernels are compiled for x and scales of these."""
    return dtype in (torch.float16, torch.bfloat16) and (scales == dtype or scales in _SCALES)


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
    tile = choose_few(k, group, gated=gated, wide_scales=scales.dtype == torch.float32)
    out = torch.empty((m, n // 2 if gated else n), dtype=x_MK.dtype, device=x_MK.device)
    kernel = _kernel(tile, group, x_MK.dtype, scales.dtype, x_MK.device)
    kernel.launch(
        tile.blocks_of(n, processors(x_MK.device)), 32 * tile.warps, _stream(),
        *_pointers(codes, scales, x_MK, bias_N, out), c_int(m), c_int(n), c_int(k), overlap=pdl,
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
    tile: Few | Tens, group: int, dtype: torch.dtype, scales: torch.dtype, device: torch.device
) -> cuda.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    text = source(tile, group, dtype, scales)
    module = cuda.load(binaries([text], f"sm_{major}{minor}")[0])
    name = "tens_of_rows" if isinstance(tile, Tens) else "few_rows"
    return cuda.Kernel(module, name, tile.shared_bytes, at_once=tile.blocks)


def kind_of(dtype: torch.dtype, scales: torch.dtype) -> dict[str, int]:
    """What codes.cu wants to know."""
    return {"IS_HALF": int(dtype == torch.float16), "SCALES": 0 if scales == dtype else _SCALES[scales]}


def source(tile: Few | Tens, group: int, dtype: torch.dtype, scales: torch.dtype) -> str:
    """The kernel's files, behind a tile's sizes."""
    sizes = {
        **tile.sizes,
        "GROUP": group,
        **kind_of(dtype, scales),
    }
    return "".join(f"#define {name} {size}\n" for name, size in sizes.items()) + "".join(
        map(_text, (*COMMON, tile.file))
    )


@cache
def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text()
