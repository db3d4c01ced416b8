"""Up to 32 rows times weights in 4 bits, as fast as the codes arrive (few_rows4.cu): any GPU from sm_80 on.

Compiled by NVRTC, kept where Triton keeps its kernels. Dimensions: M rows of x, N output channels, K columns.
"""

from __future__ import annotations

import hashlib
from ctypes import c_int, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.cache import get_cache_manager

from cluster.collectives import cuda

MOST_ROWS = 32
CHUNK = 128  # columns that a warp takes at a time
_FILE = "few_rows4.cubin"


@dataclass(frozen=True, slots=True)
class Tile:
    """Of a block: 16s of channels, 8s of rows, warps that share the columns, and loads ahead of each."""

    channels: int
    rows: int
    warps: int
    ahead: int


TILES = {1: Tile(1, 1, 8, 4), 2: Tile(2, 2, 8, 2), 4: Tile(2, 4, 8, 2)}
GATED_TILES = {1: Tile(2, 1, 8, 2), 2: Tile(2, 2, 8, 2), 4: Tile(2, 4, 8, 2)}


def takes(x_MK: Tensor, scales: Tensor, group: int) -> bool:
    if not x_MK.is_cuda or group not in (32, 64, 128) or len(x_MK) > MOST_ROWS or x_MK.shape[1] % CHUNK:
        return False
    fits = x_MK.dtype in (torch.float16, torch.bfloat16) and scales.dtype in (x_MK.dtype, torch.float32)
    return fits and torch.cuda.get_device_capability(x_MK.device) >= (8, 0)


def product(
    x_MK: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias_N: Tensor | None,
    group: int,
    *,
    gated: bool = False,
    pdl: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """x @ weight.T + bias → [M, N], or SiLU(gate) × up → [M, N / 2]: in float32, rounded once. Contiguous tensors."""
    m, k = x_MK.shape
    n = len(codes)
    tile = tile or (GATED_TILES if gated else TILES)[1 if m <= 8 else 2 if m <= 16 else 4]
    outputs = n // 2 if gated else n
    out = torch.empty((m, outputs), dtype=x_MK.dtype, device=x_MK.device)
    kernel = _kernel(tile, group, x_MK.dtype, scales.dtype, gated, x_MK.device)
    channels = tile.channels * (8 if gated else 16)
    bias = None if bias_N is None else bias_N.data_ptr()
    pointers = [
        c_void_p(p) for p in (codes.data_ptr(), scales.data_ptr(), x_MK.data_ptr(), bias, out.data_ptr())
    ]
    stream = torch.cuda.current_stream().cuda_stream
    sizes = c_int(m), c_int(n), c_int(k)
    kernel.launch(-(-outputs // channels), 32 * tile.warps, stream, *pointers, *sizes, overlap=pdl)
    return out


@cache
def _kernel(
    tile: Tile, group: int, dtype: torch.dtype, scales: torch.dtype, gated: bool, device: torch.device
) -> cuda.Kernel:
    major, minor = torch.cuda.get_device_capability(device)
    text = source(tile, group, dtype, scales, gated)
    return cuda.Kernel(cuda.load(binary(text, f"sm_{major}{minor}")), "few_rows4")


def source(tile: Tile, group: int, dtype: torch.dtype, scales: torch.dtype, gated: bool) -> str:
    """few_rows4.cu for a tile."""
    sizes = {
        "MT": tile.channels,
        "NT": tile.rows,
        "WARPS": tile.warps,
        "DEPTH": tile.ahead,
        "GROUP": group,
        "IS_HALF": int(dtype == torch.float16),
        "WIDE_SCALES": int(scales == torch.float32),
        "GATED": int(gated),
    }
    return "".join(f"#define {name} {size}\n" for name, size in sizes.items()) + _text()


@cache
def _text() -> str:
    return Path(__file__).with_suffix(".cu").read_text()


def binary(text: str, architecture: str) -> bytes:
    """Compiled in a process of its own, or by an earlier start with the same CUDA. Needs NVRTC but no GPU."""
    kept = get_cache_manager(
        hashlib.sha256(f"{torch.version.cuda} {architecture} {text}".encode()).hexdigest()
    )
    if kept.get_file(_FILE) is None:
        (made,) = cuda.compile_sources([text], architecture)
        kept.put(made, _FILE)
    return Path(kept.get_file(_FILE)).read_bytes()
