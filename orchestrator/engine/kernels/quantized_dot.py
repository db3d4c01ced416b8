"""Tens of rows times weights in 8 and 4 bits, widened on their way into tensor cores; and widening into memory.

Dimensions as in quantized.py, which has the trick for 4 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 32  # of a program: 128 programs of 4096 channels, an H100 has 132 places


def choose_depth(rows: int) -> tuple[int, int, int]:
    """(words of eight codes, 8-bit codes, stages) that a program reads of each channel at a time, and ahead.

    What is under way must fit the 99 KB of shared memory that a program may have on a 4090.
    """
    return (64, 256, 3) if rows <= 16 else (32, 128, 2)


@triton.jit
def _weights4(tile, plane: tl.constexpr, scale16, offset):
    """Of the eight codes of each word the one at `plane`, as float32."""
    if plane < 5:  # noqa: SIM108 (Triton)
        bits = tile << (19 - 4 * plane)
    else:
        bits = tile >> (4 * plane - 19)
    return ((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True) * scale16 + offset


@triton.jit
def _dot4(
    x,
    words,
    scales,
    bias,
    out,
    M,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    M_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    EIGHTH: tl.constexpr = GROUP // 8
    place = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.minimum(place, N - 1).to(tl.int64)[:, None]
    row = tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)
    sums = tl.zeros((M_BLOCK, CHANNELS), tl.float32)
    for first in tl.range(0, K // 8, WORDS, num_stages=STAGES):
        word = first + tl.arange(0, WORDS)
        inside = word[None, :] < K // 8
        group = word // EIGHTH
        column = group * GROUP + word % EIGHTH
        tile = tl.load(words + n * (K // 8) + word[None, :], mask=inside, other=0)
        pair = scales + (n * (K // GROUP) + group[None, :]) * 2
        scale = tl.load(pair, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(pair + 1, mask=inside, other=0.0).to(tl.float32) - 24.0 * scale
        for plane in tl.static_range(8):
            weights = _weights4(tile, plane, 16.0 * scale, offset)
            xs = x + row[:, None].to(tl.int64) * K + (column + plane * EIGHTH)[None, :]
            some = tl.load(xs, mask=(row[:, None] < M) & inside, other=0.0)
            sums = tl.dot(some, tl.trans(weights.to(some.dtype)), sums, input_precision="ieee")
    if HAS_BIAS:
        sums += tl.load(bias + tl.minimum(place, N - 1)).to(tl.float32)[None, :]
    mask = (row[:, None] < M) & (place[None, :] < N)
    where = out + row[:, None].to(tl.int64) * N + place[None, :]
    tl.store(where, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dot8(
    x,
    codes,
    scales,
    bias,
    out,
    M,
    N,
    K: tl.constexpr,
    M_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STAGES: tl.constexpr,
):
    place = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.minimum(place, N - 1)
    row = tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)
    sums = tl.zeros((M_BLOCK, CHANNELS), tl.float32)
    for first in tl.range(0, K, COLUMNS, num_stages=STAGES):
        column = first + tl.arange(0, COLUMNS)[None, :]
        tile = tl.load(codes + n.to(tl.int64)[:, None] * K + column, mask=column < K, other=0.0)
        xs = x + row[:, None].to(tl.int64) * K + column
        some = tl.load(xs, mask=(row[:, None] < M) & (column < K), other=0.0)
        sums = tl.dot(some, tl.trans(tile.to(tl.float32).to(some.dtype)), sums, input_precision="ieee")
    sums *= tl.load(scales + n).to(tl.float32)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + n).to(tl.float32)[None, :]
    mask = (row[:, None] < M) & (place[None, :] < N)
    where = out + row[:, None].to(tl.int64) * N + place[None, :]
    tl.store(where, sums.to(out.dtype.element_ty), mask=mask)


def dot(x_MK: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, group: int) -> Tensor:
    """x @ weight.T + bias → [M, N] in x's dtype, summed in float32. Contiguous tensors.

    4-bit weights are rounded to x's dtype before they are multiplied; 8-bit codes need no rounding.
    """
    m, k = x_MK.shape
    n = len(codes)
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    block = min(64, max(16, triton.next_power_of_2(m)))
    grid = (triton.cdiv(n, CHANNELS), triton.cdiv(m, block))
    bias = scales if bias_N is None else bias_N
    most_words, most_columns, stages = choose_depth(block)
    common = {
        "K": k,
        "M_BLOCK": block,
        "CHANNELS": CHANNELS,
        "HAS_BIAS": bias_N is not None,
        "STAGES": stages,
    }
    if group:
        tall = max(16, min(most_words, triton.next_power_of_2(k // 8)))
        words = codes.view(torch.int32)
        _dot4[grid](x_MK, words, scales, bias, out, m, n, GROUP=group, WORDS=tall, num_warps=4, **common)
    else:
        wide = max(16, min(most_columns, triton.next_power_of_2(k)))
        _dot8[grid](x_MK, codes, scales, bias, out, m, n, COLUMNS=wide, num_warps=4, **common)
    return out


@triton.jit
def _widen4(words, scales, out, TOTAL, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """A program has some words, of one channel after another."""
    EIGHTH: tl.constexpr = GROUP // 8
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = word < TOTAL
    group = word // EIGHTH
    tile = tl.load(words + word, mask=inside, other=0)
    scale = tl.load(scales + group * 2, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(scales + group * 2 + 1, mask=inside, other=0.0).to(tl.float32) - 24.0 * scale
    for plane in tl.static_range(8):
        weights = _weights4(tile, plane, 16.0 * scale, offset)
        column = group * GROUP + plane * EIGHTH + word % EIGHTH
        tl.store(out + column, weights.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _widen8(codes, scales, out, TOTAL, K: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < TOTAL
    scale = tl.load(scales + at // K, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(codes + at, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)


def widen(codes: Tensor, scales: Tensor, group: int, out_NK: Tensor) -> Tensor:
    """Fills `out_NK`, contiguous, with the weights. → it."""
    block = 1024
    if group:
        words = codes.view(torch.int32)
        grid = (triton.cdiv(words.numel(), block),)
        _widen4[grid](words, scales, out_NK, words.numel(), K=out_NK.shape[1], GROUP=group, BLOCK=block)
    else:
        grid = (triton.cdiv(codes.numel(), 2 * block),)
        _widen8[grid](codes, scales, out_NK, codes.numel(), K=out_NK.shape[1], BLOCK=2 * block)
    return out_NK


def widened(
    x_MK: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, group: int, at_once: int
) -> Tensor:
    """x @ weight.T + bias by cuBLAS, so many weights widened at once."""
    m, k = x_MK.shape
    n = len(codes)
    step = max(1, at_once // k)
    room = torch.empty((min(step, n), k), dtype=x_MK.dtype, device=x_MK.device)
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        wide = widen(codes[rows], scales[rows], group, room[: rows.stop - start])
        torch.mm(x_MK, wide.t(), out=out[:, rows])
    return out if bias_N is None else out.add_(bias_N)
