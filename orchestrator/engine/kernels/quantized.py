"""Products by weights in 8 and 4 bits, as orchestrator/engine/quantized.py keeps them.

A few rows of x are bound by the bytes of the weights: programs stream them past all rows, as gemv.py does. Tens of rows
go through tensor cores, the weights widened on their way from memory. For more the weights are widened into memory
first and cuBLAS multiplies, which gives it a piece at a time that stays in the L2 cache. Of 4 bits up to 128 rows go
by four_bits.py, tens of rows up to 256 by four_bits_hopper.py, where they can.

4 bits: bits of a code are put into the mantissa of a float between 1 and 2, which is 1 + code / 16: an AND and an OR,
where a conversion takes a slot of a slower unit. The rest is folded into scale and zero.

Dimensions: M rows of x, N output channels, K columns, W words of eight codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from orchestrator.engine.kernels import four_bits, four_bits_hopper
from orchestrator.engine.kernels.activation import silu_mul
from orchestrator.engine.kernels.quantized_dot import WIDENED_WEIGHTS, dot, widened

MAX_ROWS = 2
"""Rows of x that the streaming kernels take; each number of rows has a kernel of its own to compile."""

MIDDLE_ROWS = 128
"""Up to which weights are widened on their way into tensor cores."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Channels of a program, and elements of a row that it reads at a time: codes of 8 bits, or words of eight."""

    rows: int
    elements: int
    warps: int


def choose_tile8(k: int) -> Tile:
    """16 bytes a thread of each row, four warps; two channels a program, four where rows are short."""
    elements = min(2048, triton.next_power_of_2(k))
    return Tile(2 if k > 4096 else 4, elements, max(1, min(4, elements // 512)))


def choose_tile4(k: int) -> Tile:
    """Of Llama-3.1-8B on an H100 (2026-11-22), in µs: gate and up 32.9, o 7.7; down 19.1, and by tiles of 512 words of
    two channels 23.0."""
    if k > 4096:
        return Tile(4, 256, 2)
    words = min(512, triton.next_power_of_2(k // 8))
    return Tile(4, words, max(1, min(4, words // 128)))


@triton.jit
def _stream8(
    x,
    codes,
    scales,
    bias,
    out,
    N,
    M: tl.constexpr,
    K: tl.constexpr,
    M_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles are [COLUMNS / 8, M, ROWS, 8]: eights, so that Triton gives a thread as many codes as numbers of x.

    The scale multiplies the sum.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.minimum(place, N - 1)
    column = tl.arange(0, COLUMNS // 8)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    row = tl.arange(0, M_BLOCK)
    weights = codes + n.to(tl.int64)[None, None, :, None] * K + column
    xs = x + row[None, :, None, None] * K + column
    rows_in = row[None, :, None, None] < M
    tile = tl.load(weights, mask=column < K, other=0.0, eviction_policy="evict_first").to(tl.float32)
    scale = tl.load(scales + n).to(tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + n).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    products = tile * tl.load(xs, mask=rows_in & (column < K), other=0.0).to(tl.float32)
    for start in tl.range(COLUMNS, K, COLUMNS):
        inside = column + start < K
        tile = tl.load(weights + start, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        products += tile * tl.load(xs + start, mask=rows_in & inside, other=0.0).to(tl.float32)
    result = tl.sum(tl.sum(products, axis=3), axis=0) * scale[None, :]
    if HAS_BIAS:
        result += offset[None, :]
    mask = (row[:, None] < M) & (place[None, :] < N)
    tl.store(out + row[:, None] * N + place[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _stream4(
    x,
    words,
    scales,
    bias,
    out,
    N,
    M: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    M_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles are [GROUPS, M, ROWS, words of a group]: in this order Triton lays threads along columns alone, of weights
    and of x alike, and x need not move between them.

    A group's part is 16 scale × (codes · x) + (zero − 24 scale) × sum of x, where codes stand for 1 + code / 16.
    """
    EIGHTH: tl.constexpr = GROUP // 8
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.minimum(place, N - 1)
    group = tl.arange(0, GROUPS)[:, None, None, None]
    word = tl.arange(0, EIGHTH)[None, None, None, :]
    row = tl.arange(0, M_BLOCK)
    n4 = n.to(tl.int64)[None, None, :, None]
    weights = words + n4 * (K // 8) + group * EIGHTH + word
    pairs = scales + (n4 * (K // GROUP) + group) * 2
    xs = x + row[None, :, None, None] * K + group * GROUP + word
    rows_in = row[None, :, None, None] < M
    tile = tl.load(weights, mask=group < K // GROUP, other=0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_wait()
    total = tl.zeros((GROUPS, M_BLOCK, ROWS, EIGHTH), tl.float32)
    for first in tl.range(0, K // GROUP, GROUPS):
        inside = group + first < K // GROUP
        ahead = group + first + GROUPS < K // GROUP
        coming = tl.load(
            weights + (first + GROUPS) * EIGHTH, mask=ahead, other=0, eviction_policy="evict_first"
        )
        scale = tl.load(pairs + first * 2, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(pairs + first * 2 + 1, mask=inside, other=0.0).to(tl.float32)
        dot = tl.zeros((GROUPS, M_BLOCK, ROWS, EIGHTH), tl.float32)
        plain = tl.zeros((GROUPS, M_BLOCK, 1, EIGHTH), tl.float32)
        for plane in tl.static_range(8):
            if plane < 5:  # noqa: SIM108 (Triton)
                bits = tile << (19 - 4 * plane)
            else:
                bits = tile >> (4 * plane - 19)
            code = ((bits & 0x780000) | 0x3F800000).to(tl.float32, bitcast=True)
            some = tl.load(xs + first * GROUP + plane * EIGHTH, mask=rows_in & inside, other=0.0).to(
                tl.float32
            )
            dot += code * some
            plain += some
        total += dot * (16.0 * scale) + plain * (zero - 24.0 * scale)
        tile = coming
    result = tl.sum(tl.sum(total, axis=3), axis=0)
    if HAS_BIAS:
        result += tl.load(bias + n).to(tl.float32)[None, :]
    mask = (row[:, None] < M) & (place[None, :] < N)
    tl.store(out + row[:, None] * N + place[None, :], result.to(out.dtype.element_ty), mask=mask)


def stream(
    x_MK: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, group: int, *, pdl: bool = False
) -> Tensor:
    """x @ weight.T + bias → [M, N], summed in float32 and rounded once to x's dtype. Contiguous tensors."""
    m, k = x_MK.shape
    n = len(codes)
    assert m <= MAX_ROWS, f"{m} rows of x: the streaming kernels take up to {MAX_ROWS}"
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    common = {
        "M": m,
        "K": k,
        "M_BLOCK": triton.next_power_of_2(m),
        "HAS_BIAS": bias_N is not None,
        "PDL": pdl,
    }
    bias = scales if bias_N is None else bias_N
    if group:
        tile = choose_tile4(k)
        groups = max(1, tile.elements // (group // 8))
        _stream4[(triton.cdiv(n, tile.rows),)](
            x_MK, codes.view(torch.int32), scales, bias, out, n,
            GROUP=group, ROWS=tile.rows, GROUPS=groups, num_warps=tile.warps, launch_pdl=pdl, **common,
        )  # fmt: skip
    else:
        tile = choose_tile8(k)
        _stream8[(triton.cdiv(n, tile.rows),)](
            x_MK, codes, scales, bias, out, n,
            ROWS=tile.rows, COLUMNS=tile.elements, num_warps=tile.warps, launch_pdl=pdl, **common,
        )  # fmt: skip
    return out


def quantized(
    x_MK: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, group: int, *, pdl: bool = False
) -> Tensor:
    """x @ weight.T + bias → [M, N], by what suits so many rows. `group`: of 4-bit weights; 0: 8 bits."""
    if group and four_bits_hopper.takes(x_MK, len(codes), scales, group):
        return four_bits_hopper.multiply(x_MK, codes, scales, bias_N, group, pdl=pdl)
    if group and four_bits.takes(x_MK, scales, group):
        is_few = len(x_MK) <= four_bits.most_few_rows(group)
        by_rows = four_bits.few_rows if is_few else four_bits.tens_of_rows
        return by_rows(x_MK, codes, scales, bias_N, group, pdl=pdl)
    return by_triton(x_MK, codes, scales, bias_N, group, pdl=pdl)


def quantized_gate_up(
    x_MK: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, group: int, *, pdl: bool = False
) -> Tensor:
    """SiLU(gate) × up → [M, N / 2], the gate's rows first in the weight."""
    if group and four_bits_hopper.takes(x_MK, len(codes), scales, group):
        return four_bits_hopper.multiply(x_MK, codes, scales, bias_N, group, gated=True, pdl=pdl)
    if group and len(x_MK) <= four_bits.most_few_rows(group) and four_bits.takes(x_MK, scales, group):
        return four_bits.few_rows(x_MK, codes, scales, bias_N, group, gated=True, pdl=pdl)
    return silu_mul(quantized(x_MK, codes, scales, bias_N, group, pdl=pdl), pdl=pdl)


def rows_by_kernel(x_MK: Tensor, codes: Tensor, scales: Tensor, group: int) -> list[int]:
    """The fewest rows like x's that choose another kernel, or another tile."""
    fewest = {1, 2, 3, 9, 17, 33, 65, 1 + four_bits.most_few_rows(group)}
    if group and four_bits_hopper.fits(x_MK, len(codes), scales, group):
        fewest |= {four_bits_hopper.FEWEST_ROWS, *(1 + rows for rows in four_bits_hopper.ROWS[:-1])}
    return sorted(fewest)


def by_triton(
    x_MK: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, group: int, *, pdl: bool = False
) -> Tensor:
    rows = len(x_MK)
    if rows <= MAX_ROWS:
        return stream(x_MK, codes, scales, bias_N, group, pdl=pdl)
    if rows <= MIDDLE_ROWS:
        return dot(x_MK, codes, scales, bias_N, group)
    return widened(x_MK, codes, scales, bias_N, group, WIDENED_WEIGHTS)
