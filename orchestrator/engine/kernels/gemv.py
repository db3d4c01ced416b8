"""Matrix-vector products of decode: a few rows of x times a whole weight matrix, at the speed its bytes arrive.

A program streams a few rows of the weights past all rows of x. With `pdl` the first tile of them is on its
way before the producer of x has ended (overlap.py).

Dimensions: B rows of x, N rows and K columns of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 2  # rows of x; at four cuBLAS is level, and each number of rows has kernels of its own to compile


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program computes: rows of the weight (a gate row and its up row are two), some columns at a time."""

    rows: int
    columns: int
    warps: int


@cache
def choose_tile(k: int, itemsize: int) -> Tile:
    """The tile for a weight of k columns, of `itemsize` bytes an element.

    The fastest of up to ten tiles, or within 3 % of it (10 % for two rows of x and 7168 columns), for one or two rows
    of x and bf16 weights of 3072 x 4096 to 128256 x 4096 and 4096 x 2048 to 4096 x 14336 (H100 SXM, 2026-11-22).
    """
    if k <= 2048:
        rows, columns = 4, 1024
    elif k <= 4096:
        rows, columns = 4, 2048
    else:
        rows, columns = 2, 4096
    columns = min(columns * 2 // itemsize, triton.next_power_of_2(k))
    return Tile(
        rows, columns, warps=min(8, max(1, columns * itemsize // 512))
    )  # a thread's load: 16 bytes of a row


@triton.jit
def _load_weights(pointers, column, K: tl.constexpr, EVEN: tl.constexpr):
    # Each weight is used once a step: evicted first, it leaves the L2 cache to what is used again.
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first").to(tl.float32)
    return tl.load(pointers, mask=column < K, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _load_x(pointers, row, column, B: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr):
    if EVEN and FULL:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=(row < B) & (column < K), other=0.0).to(tl.float32)


@triton.jit
def _gemv(
    x,
    weight,
    bias,
    out,
    N,  # of the output: half the weight's rows where GATED
    B: tl.constexpr,
    K: tl.constexpr,
    B_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles are [B, ROWS, COLUMNS], x and weights broadcast to it. GATED: gate rows at even places, up rows at odd."""
    EVEN: tl.constexpr = K % COLUMNS == 0
    FULL: tl.constexpr = B == B_BLOCK
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.arange(0, ROWS)
    if GATED:
        n = tl.minimum(tl.program_id(0) * (ROWS // 2) + place // 2, N - 1) + (place % 2) * N
    else:
        n = tl.minimum(tl.program_id(0) * ROWS + place, N - 1)
    column = tl.arange(0, COLUMNS)[None, None, :]
    row = tl.arange(0, B_BLOCK)
    weights = weight + n.to(tl.int64)[None, :, None] * K + column
    xs = x + row[:, None, None] * K + column
    tile = _load_weights(weights, column, K, EVEN)
    if HAS_BIAS:
        offset = tl.load(bias + n).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    products = tile * _load_x(xs, row[:, None, None], column, B, K, EVEN, FULL)
    for start in tl.range(COLUMNS, K, COLUMNS):
        tile = _load_weights(weights + start, column + start, K, EVEN)
        products += tile * _load_x(xs + start, row[:, None, None], column + start, B, K, EVEN, FULL)
    result = tl.sum(products, axis=2)
    if HAS_BIAS:
        result += offset[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(result, (B_BLOCK, ROWS // 2, 2)))
        result = gate / (1.0 + tl.exp(-gate)) * up
        n = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    else:
        n = tl.program_id(0) * ROWS + place
    inside = (row[:, None] < B) & (n[None, :] < N)
    tl.store(out + row[:, None] * N + n[None, :], result.to(out.dtype.element_ty), mask=inside)


def gemv(
    x_BK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    out: Tensor | None = None,
    *,
    pdl: bool = False,
) -> Tensor:
    """x @ weight.T + bias → [B, N], summed in float32 and rounded once, to `out`'s dtype or x's. Contiguous tensors."""
    n = weight_NK.shape[0]
    if out is None:
        out = torch.empty((x_BK.shape[0], n), dtype=x_BK.dtype, device=x_BK.device)
    return _launch(x_BK, weight_NK, bias_N, out, n, gated=False, pdl=pdl)


def gate_up(x_BK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, pdl: bool = False) -> Tensor:
    """SiLU(gate) × up → [B, N/2], the gate's rows first in the weight; in float32 until the end. Contiguous tensors."""
    half = weight_NK.shape[0] // 2
    out = torch.empty((x_BK.shape[0], half), dtype=x_BK.dtype, device=x_BK.device)
    return _launch(x_BK, weight_NK, bias_N, out, half, gated=True, pdl=pdl)


def _launch(
    x_BK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, out: Tensor, n: int, *, gated: bool, pdl: bool
) -> Tensor:
    b, k = x_BK.shape
    assert b <= MAX_ROWS, f"{b} rows of x: gemv takes up to {MAX_ROWS}"
    tile = choose_tile(k, weight_NK.element_size())
    _gemv[(triton.cdiv(weight_NK.shape[0], tile.rows),)](
        x_BK,
        weight_NK,
        weight_NK if bias_N is None else bias_N,
        out,
        n,
        B=b,
        K=k,
        B_BLOCK=triton.next_power_of_2(b),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        GATED=gated,
        HAS_BIAS=bias_N is not None,
        PDL=pdl,
        num_warps=tile.warps,
        launch_pdl=pdl,
    )
    return out
