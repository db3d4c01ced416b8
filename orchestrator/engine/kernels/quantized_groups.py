"""Products by 8-bit codes with a scale, and a least value or none, in groups of 32 or 16 columns: GGUF's blocks.

As quantized.py's: a few rows stream the codes, tens go through tensor cores with the codes widened on their way, for
more the weights are widened into memory first. Dimensions: M rows of x, N output channels, K columns, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orchestrator.engine.kernels.quantized_dot import WIDENED_WEIGHTS, in_pieces

STREAM_ROWS = 2
DOT_ROWS = 128
CHANNELS, COLUMNS = 64, 64  # of a program of `_dot`


@triton.jit
def _widened(codes, scales, n, column, inside, K: tl.constexpr, GROUP: tl.constexpr, NUMBERS: tl.constexpr):
    """Weights of channels `n` and columns `column`, float32; where not `inside`, 0."""
    group = scales + (n * (K // GROUP) + column // GROUP) * NUMBERS
    scale = tl.load(group, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(codes + n * K + column, mask=inside, other=0).to(tl.float32) * scale
    if NUMBERS == 2:
        wide += tl.load(group + 1, mask=inside, other=0.0).to(tl.float32)
    return wide


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
    M_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program has ROWS channels, and BLOCK columns of them at a time: tiles are [M, channels, columns]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.minimum(place, N - 1).to(tl.int64)[None, :, None]
    row = tl.arange(0, M_BLOCK)
    total = tl.zeros((M_BLOCK, ROWS, BLOCK), tl.float32)
    for first in tl.range(0, K, BLOCK):
        column = first + tl.arange(0, BLOCK)[None, None, :]
        inside = column < K
        weights = _widened(codes, scales, n, column, inside, K, GROUP, NUMBERS)
        mask = (row[:, None, None] < M) & inside
        total += weights * tl.load(x + row[:, None, None] * K + column, mask=mask, other=0.0).to(tl.float32)
    result = tl.sum(total, axis=2)
    if HAS_BIAS:
        result += tl.load(bias + tl.minimum(place, N - 1)).to(tl.float32)[None, :]
    where = out + row[:, None] * N + place[None, :]
    tl.store(where, result.to(out.dtype.element_ty), mask=(row[:, None] < M) & (place[None, :] < N))


@triton.jit
def _dot(
    x,
    codes,
    scales,
    bias,
    out,
    M,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NUMBERS: tl.constexpr,
    M_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Program (i, j): channels i, rows j. Weights are rounded to x's dtype, and are the left operand."""
    place = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.minimum(place, N - 1).to(tl.int64)[:, None]
    row = tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)
    rows = x + tl.minimum(row, M - 1).to(tl.int64)[None, :] * K
    sums = tl.zeros((CHANNELS, M_BLOCK), tl.float32)
    for first in tl.range(0, K, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        weights = _widened(codes, scales, n, column[None, :], column[None, :] < K, K, GROUP, NUMBERS)
        xs = tl.load(rows + column[:, None], mask=column[:, None] < K, other=0.0)
        sums = tl.dot(weights.to(xs.dtype), xs, sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + tl.minimum(place, N - 1)).to(tl.float32)[:, None]
    where = out + row[None, :].to(tl.int64) * N + place[:, None]
    tl.store(where, sums.to(out.dtype.element_ty), mask=(row[None, :] < M) & (place[:, None] < N))


@triton.jit
def _widen(
    codes,
    scales,
    out,
    TOTAL,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wide = _widened(codes, scales, at // K, at % K, at < TOTAL, K, GROUP, NUMBERS)
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=at < TOTAL)


def groups_of_8(
    x_MK: Tensor, codes_NK: Tensor, scales: Tensor, bias_N: Tensor | None, *, pdl: bool = False
) -> Tensor:
    """x @ weight.T + bias → [M, N] in x's dtype, summed in float32. scales: [N, G, 1 or 2]; contiguous tensors."""
    m, k = x_MK.shape
    n = len(codes_NK)
    if m > DOT_ROWS:
        return _by_widening(x_MK, codes_NK, scales, bias_N)
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    bias = out if bias_N is None else bias_N
    how = {"K": k, "GROUP": k // scales.shape[1], "NUMBERS": scales.shape[2], "HAS_BIAS": bias_N is not None}
    if m <= STREAM_ROWS:
        block, rows = min(1024, triton.next_power_of_2(k)), 4
        _stream[(triton.cdiv(n, rows),)](
            x_MK, codes_NK, scales, bias, out, n, M=m, M_BLOCK=triton.next_power_of_2(m),
            ROWS=rows, BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl, **how,
        )  # fmt: skip
        return out
    block = max(16, triton.next_power_of_2(m))
    _dot[(triton.cdiv(n, CHANNELS), triton.cdiv(m, block))](
        x_MK, codes_NK, scales, bias, out, m, n,
        M_BLOCK=block, CHANNELS=CHANNELS, COLUMNS=COLUMNS, num_warps=4, num_stages=3 if block < 64 else 2, **how,
    )  # fmt: skip
    return out


def _by_widening(x_MK: Tensor, codes_NK: Tensor, scales: Tensor, bias_N: Tensor | None) -> Tensor:
    n, k = codes_NK.shape
    how = {"K": k, "GROUP": k // scales.shape[1], "NUMBERS": scales.shape[2], "BLOCK": 2048}

    def fill(rows: slice, room: Tensor) -> None:
        _widen[(triton.cdiv(room.numel(), 2048),)](codes_NK[rows], scales[rows], room, room.numel(), **how)

    return in_pieces(x_MK, n, fill, bias_N, WIDENED_WEIGHTS)
