"""Products by 8-bit codes with a scale, and a least value or none, in groups of 32 or 16 columns: GGUF's blocks.

As quantized.py's: a few rows stream the codes, tens go through tensor cores with the codes widened on their way, for
more the weights are widened into memory first. Tiles have axes of their own for groups, or for eights of columns, so
that a scale is read once for its codes. Dimensions: M rows of x, N output channels, K columns, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orchestrator.engine.kernels.quantized_dot import (
    WIDENED_WEIGHTS,
    DotTile,
    added,
    even_parts,
    in_pieces,
    splits_of,
)

DOT_ROWS = 128
STREAMS = {1: (1, 4096, 4), 2: (2, 2048, 4)}
"""Rows of x -> channels, columns at a time and warps of a program of `_stream`."""
TILES = {
    16: DotTile(64, 16, 128, 4, 4),
    32: DotTile(64, 32, 128, 4, 3),
    64: DotTile(128, 64, 64, 8, 3),
    128: DotTile(128, 128, 64, 8, 3),
}
"""The fastest of those tried over a layer of Llama-3.1-8B (H100 SXM, 2026-11-23), in µs of Q6_K and Q8_0: of 1, 2, 16,
32, 64, 128 rows 104, 120, 152, 175, 185, 292 and 86, 104, 158, 155, 182, 238; bf16 by cuBLAS 157 to 185. With a scale
read for each code, before: 287, 326, 1796, 1799, 1881, 1951 and 246, 291, 535, 541, 912, 805."""
WIDENED = 2048  # weights of a program of `_widen`


@triton.jit
def _stream(
    x,
    codes,
    scales,
    bias,
    out,
    N,
    M: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NUMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles are [eights of columns, M, channels, 8], as in quantized.py; an eight's sum is scaled."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.minimum(place, N - 1).to(tl.int64)
    row = tl.arange(0, M)
    eight = tl.arange(0, COLUMNS // 8)[:, None, None] * 8
    column = eight[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
    weights = codes + n[None, None, :, None] * K + column
    groups = scales + (n[None, None, :] * (K // GROUP) + eight // GROUP) * NUMBERS
    xs = x + row[None, :, None, None] * K + column
    tile = tl.load(weights, mask=column < K, other=0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((COLUMNS // 8, M, CHANNELS), tl.float32)
    for first in tl.range(0, K, COLUMNS):
        inside = first + eight < K
        ahead = first + COLUMNS + column < K
        coming = tl.load(weights + first + COLUMNS, mask=ahead, other=0, eviction_policy="evict_first")
        group = groups + first // GROUP * NUMBERS
        scale = tl.load(group, mask=inside, other=0.0).to(tl.float32)
        some = tl.load(xs + first, mask=first + column < K, other=0.0).to(tl.float32)
        total += tl.sum(tile.to(tl.float32) * some, axis=3) * scale
        if NUMBERS == 2:
            total += tl.sum(some, axis=3) * tl.load(group + 1, mask=inside, other=0.0).to(tl.float32)
        tile = coming
    result = tl.sum(total, axis=0)
    if HAS_BIAS:
        result += tl.load(bias + n).to(tl.float32)[None, :]
    where = out + row[:, None] * N + place[None, :]
    tl.store(where, result.to(out.dtype.element_ty), mask=place[None, :] < N)


@triton.jit
def _dot(
    x,
    codes,
    scales,
    out,
    M,
    N,
    STRIDE,
    PER_SPLIT,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NUMBERS: tl.constexpr,
    M_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (i, s): channels i, all rows, columns s × PER_SPLIT on; to out[s]. Weights are rounded to x's dtype."""
    OF_TILE: tl.constexpr = COLUMNS // GROUP
    place = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.minimum(place, N - 1).to(tl.int64)[:, None]
    row = tl.arange(0, M_BLOCK)
    rows = x + tl.minimum(row, M - 1).to(tl.int64)[None, :] * K
    sums = tl.zeros((CHANNELS, M_BLOCK), tl.float32)
    begin = tl.program_id(1) * PER_SPLIT
    end = tl.minimum(begin + PER_SPLIT, K)
    for first in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        column = first + tl.arange(0, COLUMNS)
        group = first // GROUP + tl.arange(0, OF_TILE)
        pair = scales + (n * (K // GROUP) + group[None, :]) * NUMBERS
        inside = group[None, :] < K // GROUP
        if K % COLUMNS == 0:
            tile = tl.load(codes + n * K + column[None, :])
            xs = tl.load(rows + column[:, None])
        else:
            tile = tl.load(codes + n * K + column[None, :], mask=column[None, :] < K, other=0)
            xs = tl.load(rows + column[:, None], mask=column[:, None] < K, other=0.0)
        scale = tl.load(pair, mask=inside, other=0.0).to(tl.float32)
        wide = tl.reshape(tile, (CHANNELS, OF_TILE, GROUP)).to(tl.float32) * scale[:, :, None]
        if NUMBERS == 2:
            wide += tl.load(pair + 1, mask=inside, other=0.0).to(tl.float32)[:, :, None]
        weights = tl.reshape(wide, (CHANNELS, COLUMNS)).to(xs.dtype)
        sums = tl.dot(weights, xs, sums, input_precision="ieee")
    where = out + tl.program_id(1).to(tl.int64) * STRIDE + row[None, :].to(tl.int64) * N + place[:, None]
    tl.store(where, sums, mask=(row[None, :] < M) & (place[:, None] < N))


@triton.jit
def _widen(codes, scales, out, TOTAL, GROUP: tl.constexpr, NUMBERS: tl.constexpr, BLOCK: tl.constexpr):
    """A program has some weights, of one channel after another."""
    eight = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK // 8) * 8)[:, None]
    at = eight + tl.arange(0, 8)[None, :]
    group = scales + eight // GROUP * NUMBERS
    wide = tl.load(codes + at, mask=at < TOTAL, other=0).to(tl.float32)
    wide *= tl.load(group, mask=eight < TOTAL, other=0.0).to(tl.float32)
    if NUMBERS == 2:
        wide += tl.load(group + 1, mask=eight < TOTAL, other=0.0).to(tl.float32)
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=at < TOTAL)


def groups_of_8(
    x_MK: Tensor, codes_NK: Tensor, scales: Tensor, bias_N: Tensor | None, *, pdl: bool = False
) -> Tensor:
    """x @ weight.T + bias → [M, N] in x's dtype, summed in float32. scales: [N, G, 1 or 2]; contiguous tensors."""
    if len(x_MK) in STREAMS:
        return stream(x_MK, codes_NK, scales, bias_N, pdl=pdl)
    if len(x_MK) <= DOT_ROWS:
        return dot(x_MK, codes_NK, scales, bias_N)
    return _by_widening(x_MK, codes_NK, scales, bias_N)


def stream(
    x_MK: Tensor, codes_NK: Tensor, scales: Tensor, bias_N: Tensor | None, *, pdl: bool = False
) -> Tensor:
    m, k = x_MK.shape
    n = len(codes_NK)
    channels, columns, warps = STREAMS[m]
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    _stream[(triton.cdiv(n, channels),)](
        x_MK, codes_NK, scales, out if bias_N is None else bias_N, out, n, M=m,
        CHANNELS=channels, COLUMNS=min(columns, triton.next_power_of_2(k)), HAS_BIAS=bias_N is not None, PDL=pdl,
        num_warps=warps, launch_pdl=pdl, **_of(k, scales),
    )  # fmt: skip
    return out


def dot(x_MK: Tensor, codes_NK: Tensor, scales: Tensor, bias_N: Tensor | None) -> Tensor:
    m, k = x_MK.shape
    n = len(codes_NK)
    tile = TILES[max(16, triton.next_power_of_2(m))]
    per_split, splits = even_parts(k, tile.columns, splits_of(n, k, tile, m, 0))
    parts = torch.empty((splits, m, n), dtype=torch.float32, device=x_MK.device)
    _dot[(triton.cdiv(n, tile.channels), splits)](
        x_MK, codes_NK, scales, parts, m, n, m * n, per_split, M_BLOCK=tile.rows, CHANNELS=tile.channels,
        COLUMNS=tile.columns, STAGES=tile.stages, num_warps=tile.warps, **_of(k, scales),
    )  # fmt: skip
    return added(parts, bias_N, torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device))


def _by_widening(x_MK: Tensor, codes_NK: Tensor, scales: Tensor, bias_N: Tensor | None) -> Tensor:
    n, k = codes_NK.shape
    how = {"GROUP": k // scales.shape[1], "NUMBERS": scales.shape[2], "BLOCK": WIDENED}

    def fill(rows: slice, room: Tensor) -> None:
        _widen[(triton.cdiv(room.numel(), WIDENED),)](codes_NK[rows], scales[rows], room, room.numel(), **how)

    return in_pieces(x_MK, n, fill, bias_N, WIDENED_WEIGHTS)


def _of(k: int, scales: Tensor) -> dict[str, int]:
    return {"K": k, "GROUP": k // scales.shape[1], "NUMBERS": scales.shape[2]}
