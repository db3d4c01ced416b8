"""Tens of rows times weights in 8 and 4 bits, widened on their way into tensor cores; and widening into memory.

The weights are the left operand of a product: a Hopper's tensor cores take that from registers, where it was widened,
and only x lies in shared memory. What a program sums goes over a part of the columns where channels alone would not
keep a GPU busy; the parts are added in a fixed order.

Dimensions as in quantized.py, which has the trick for 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 264
"""To be under way: two on each of an H100's multiprocessors. Not the GPU's own number: sums are alike on all GPUs."""
PROGRAMS_OF_FEW_ROWS4 = {16: 900, 32: 512}
"""Of 4 bits, widening takes most of the time: smaller parts spread it more evenly. By the rows of a tile."""
MOST_SPLITS = 8
SMALL_SHARED_BYTES = 160_000  # a multiprocessor with less has 99 KB for a program, as a 4090's


EIGHTS = 512  # of weights, widened by a program
WIDENED_WEIGHTS = 2**26
"""So many are widened at once for cuBLAS: 128 MiB in bfloat16. With a quarter of it 4096 channels of 14336 columns came
in parts of 1170, which cuBLAS takes three times as long for (2048 rows on an H100, 2026-11-22)."""


@dataclass(frozen=True, slots=True)
class DotTile:
    """Of a program: channels, rows of x, columns at a time, warps, and loads ahead."""

    channels: int
    rows: int
    columns: int
    warps: int
    stages: int


TILES8 = {
    16: DotTile(128, 16, 128, 8, 3),
    32: DotTile(64, 32, 128, 4, 4),
    64: DotTile(128, 64, 128, 8, 3),
    128: DotTile(64, 128, 128, 4, 3),
}
TILES4 = {
    16: DotTile(64, 16, 128, 4, 4),
    32: DotTile(128, 32, 128, 8, 3),
    64: DotTile(128, 64, 128, 8, 2),
    128: DotTile(128, 128, 128, 8, 3),
}
"""The fastest over a layer of Llama-3.1-8B (H100 SXM, 2026-11-22), in µs: 8 bits 122, 136, 156, 206 (int8); 4 bits 164,
154, 183, 256. What was one tile for both before: 137, 135, 178, 294 and 164, 201, 233, 383."""


def choose_dot_tile(rows: int, group: int, shared_bytes: int) -> DotTile:
    """For so many rows of x and weights in 4 bits (`group`) or 8 (0); shared memory that a program may have."""
    block = min(128, max(16, triton.next_power_of_2(rows)))
    if shared_bytes < SMALL_SHARED_BYTES:
        return DotTile(64, block, 128, 4, {16: 4, 32: 4, 64: 3, 128: 2}[block])
    return (TILES4 if group else TILES8)[block]


@cache
def _shared_bytes(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 0
    utils = triton.runtime.driver.active.utils
    found: int = utils.get_device_properties(device.index or 0)["max_shared_mem"]
    return found


def _has_pairs(x_MK: Tensor, scales: Tensor) -> bool:
    """Not in Triton's interpreter, nor before Ampere, which has no such instruction in bfloat16."""
    halves = x_MK.dtype == scales.dtype and x_MK.dtype in (torch.bfloat16, torch.float16)
    return halves and x_MK.is_cuda and torch.cuda.get_device_capability(x_MK.device) >= (8, 0)


def splits_of(n: int, k: int, tile: DotTile, rows: int, group: int) -> int:
    """Parts of the columns that are summed apart."""
    programs = triton.cdiv(n, tile.channels) * triton.cdiv(rows, tile.rows)
    wanted = PROGRAMS_OF_FEW_ROWS4.get(tile.rows, PROGRAMS) if group else PROGRAMS
    return max(1, min(wanted // int(programs), MOST_SPLITS, k // (4 * tile.columns)))


def even_parts(length: int, unit: int, splits: int) -> tuple[int, int]:
    """→ what each part has, in whole units, and how many parts there are then."""
    each = triton.cdiv(triton.cdiv(length, unit), splits) * unit
    return each, triton.cdiv(length, each)


def _pairs(kind: str, magic: int, one: int, away: int) -> str:
    """PTX: the eight codes of each of two neighbouring words, times scale, plus zero, in pairs of 16-bit floats.

    A code's bits are put into the mantissa of 128 (1024 in float16), which makes 128 + code; less 136 that is code − 8,
    and only the last step rounds. Two instructions and a half for each weight, where float32 takes five.
    """
    lines = ["{.reg .b32 low, high, t, one, away;"]
    lines += ["prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;"]
    lines += [f"mov.b32 one, {one:#010x};", f"mov.b32 away, {away:#010x};"]
    for plane in range(8):
        lines.append(f"shr.u32 t, {'low' if plane < 4 else 'high'}, {4 * (plane % 4)};")
        lines.append(f"lop3.b32 t, t, 0x000F000F, {magic:#010x}, 0xEA;")  # (t & mask) | magic
        lines.append(f"fma.rn.{kind}x2 t, t, one, away;")
        lines.append(f"fma.rn.{kind}x2 ${plane}, t, $10, $11;")
    return "\n".join([*lines, "}"])


_PAIRS_BF16 = tl.constexpr(_pairs("bf16", 0x43004300, 0x3F803F80, 0xC308C308))
_PAIRS_FP16 = tl.constexpr(_pairs("f16", 0x64006400, 0x3C003C00, 0xE408E408))
_PAIRS_USE = tl.constexpr(",".join(["=r"] * 8 + ["r"] * 4))


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
    out,
    M,
    N,
    STRIDE,
    PER_SPLIT,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    M_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WORDS: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Program (i, j, s): channels i, rows j, words s × PER_SPLIT on; to out[s].

    Where groups are as long as WORDS, a row of words is a multiple of it; else its end is masked. PAIRS: the codes are
    widened two at a time, in x's dtype, which is the scales'.
    """
    EIGHTH: tl.constexpr = GROUP // 8
    ALL: tl.constexpr = K // 8
    place = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.minimum(place, N - 1).to(tl.int64)[:, None]
    row = tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)
    rows = x + tl.minimum(row, M - 1).to(tl.int64)[None, :] * K
    sums = tl.zeros((CHANNELS, M_BLOCK), tl.float32)
    begin = tl.program_id(2) * PER_SPLIT
    end = tl.minimum(begin + PER_SPLIT, ALL)
    word = tl.arange(0, WORDS)
    for first in tl.range(begin, end, WORDS, num_stages=STAGES):
        if EIGHTH == WORDS:
            group = first // EIGHTH
            tile = tl.load(words + n * ALL + (first + word)[None, :])
            pair = scales + (n * (K // GROUP) + group) * 2
            column = group * GROUP + word
            if PAIRS:
                weights = tl.inline_asm_elementwise(
                    _PAIRS_BF16 if x.dtype.element_ty == tl.bfloat16 else _PAIRS_FP16,
                    _PAIRS_USE,
                    [tile, tl.load(pair), tl.load(pair + 1)],
                    dtype=(x.dtype.element_ty,) * 8,
                    is_pure=True,
                    pack=2,
                )
                for plane in tl.static_range(8):
                    xs = tl.load(rows + (column + plane * EIGHTH)[:, None])
                    sums = tl.dot(weights[plane], xs, sums, input_precision="ieee")
            else:
                scale = tl.load(pair).to(tl.float32)
                offset = tl.load(pair + 1).to(tl.float32) - 24.0 * scale
                for plane in tl.static_range(8):
                    xs = tl.load(rows + (column + plane * EIGHTH)[:, None])
                    weights = _weights4(tile, plane, 16.0 * scale, offset).to(xs.dtype)
                    sums = tl.dot(weights, xs, sums, input_precision="ieee")
        else:
            at = first + word
            inside = at < end
            group = at // EIGHTH
            tile = tl.load(words + n * ALL + at[None, :], mask=inside[None, :], other=0)
            pair = scales + (n * (K // GROUP) + group[None, :]) * 2
            scale = tl.load(pair, mask=inside[None, :], other=0.0).to(tl.float32)
            offset = tl.load(pair + 1, mask=inside[None, :], other=0.0).to(tl.float32) - 24.0 * scale
            column = group * GROUP + at % EIGHTH
            for plane in tl.static_range(8):
                xs = tl.load(rows + (column + plane * EIGHTH)[:, None], mask=inside[:, None], other=0.0)
                weights = _weights4(tile, plane, 16.0 * scale, offset).to(xs.dtype)
                sums = tl.dot(weights, xs, sums, input_precision="ieee")
    where = out + tl.program_id(2).to(tl.int64) * STRIDE + row[None, :].to(tl.int64) * N + place[:, None]
    tl.store(where, sums, mask=(row[None, :] < M) & (place[:, None] < N))


@triton.jit
def _dot8(
    x,
    codes,
    out,
    M,
    N,
    STRIDE,
    PER_SPLIT,
    K: tl.constexpr,
    M_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The same of columns; not scaled yet."""
    place = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.minimum(place, N - 1).to(tl.int64)[:, None]
    row = tl.program_id(1) * M_BLOCK + tl.arange(0, M_BLOCK)
    rows = x + tl.minimum(row, M - 1).to(tl.int64)[None, :] * K
    sums = tl.zeros((CHANNELS, M_BLOCK), tl.float32)
    begin = tl.program_id(2) * PER_SPLIT
    end = tl.minimum(begin + PER_SPLIT, K)
    for first in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        column = first + tl.arange(0, COLUMNS)
        if K % COLUMNS == 0:
            tile = tl.load(codes + n * K + column[None, :])
            xs = tl.load(rows + column[:, None])
        else:
            tile = tl.load(codes + n * K + column[None, :], mask=column[None, :] < K, other=0.0)
            xs = tl.load(rows + column[:, None], mask=column[:, None] < K, other=0.0)
        sums = tl.dot(tile.to(xs.dtype), xs, sums, input_precision="ieee")
    where = out + tl.program_id(2).to(tl.int64) * STRIDE + row[None, :].to(tl.int64) * N + place[:, None]
    tl.store(where, sums, mask=(row[None, :] < M) & (place[:, None] < N))


@triton.jit
def _added(
    parts,
    scales,
    bias,
    out,
    M,
    N,
    STRIDE,
    SPLITS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the parts, scaled, and the bias: one row, some channels."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    at = tl.program_id(1).to(tl.int64) * N + n
    total = tl.load(parts + at, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + at + split * STRIDE, mask=inside, other=0.0)
    if HAS_SCALES:
        total *= tl.load(scales + n, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def dot(
    x_MK: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias_N: Tensor | None,
    group: int,
    tile: DotTile | None = None,
    splits: int = 0,
) -> Tensor:
    """x @ weight.T + bias → [M, N] in x's dtype, summed in float32. Contiguous tensors.

    4-bit weights are rounded to x's dtype before they are multiplied; 8-bit codes need no rounding.
    """
    m, k = x_MK.shape
    n = len(codes)
    halves = x_MK.dtype.itemsize == 2  # a tile of float32 takes twice the shared memory
    tile = tile or choose_dot_tile(m, group, _shared_bytes(x_MK.device) if halves else 0)
    splits = splits or splits_of(n, k, tile, m, group)
    size, all_ = (tile.columns // 8, k // 8) if group else (min(tile.columns, triton.next_power_of_2(k)), k)
    size = max(16, size)
    per_split, splits = even_parts(all_, size, splits)
    parts = torch.empty((splits, m, n), dtype=torch.float32, device=x_MK.device)
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    grid = (triton.cdiv(n, tile.channels), triton.cdiv(m, tile.rows), splits)
    common = {
        "K": k,
        "M_BLOCK": tile.rows,
        "CHANNELS": tile.channels,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }
    if group:
        words = codes.view(torch.int32)
        _dot4[grid](
            x_MK, words, scales, parts, m, n, m * n, per_split,
            GROUP=group, WORDS=size, PAIRS=_has_pairs(x_MK, scales), **common,
        )  # fmt: skip
    else:
        _dot8[grid](x_MK, codes, parts, m, n, m * n, per_split, COLUMNS=size, **common)
    return added(parts, bias_N, out, None if group else scales)


def added(parts: Tensor, bias_N: Tensor | None, out_MN: Tensor, scales_N: Tensor | None = None) -> Tensor:
    """The sum of the parts, float32 [S, M, N], in their order, scaled, and the bias. → `out_MN`."""
    splits, m, n = parts.shape
    block = 1024
    _added[(triton.cdiv(n, block), m)](
        parts, parts if scales_N is None else scales_N, parts if bias_N is None else bias_N, out_MN, m, n, m * n,
        SPLITS=splits, HAS_SCALES=scales_N is not None, HAS_BIAS=bias_N is not None, BLOCK=block,
    )  # fmt: skip
    return out_MN


@triton.jit
def _widen4(words, scales, out, TOTAL, GROUP: tl.constexpr, EIGHTS: tl.constexpr):
    """A program has some weights as they lie, a thread eight neighbours, which are 16 bytes of its warp's 512: written
    a plane at a time, groups of 32 took 766 µs a layer of Llama-3.1-8B, and so 216; of 128 214 and 205 (H100 SXM,
    2026-11-23)."""
    EIGHTH: tl.constexpr = GROUP // 8
    first = tl.program_id(0).to(tl.int64) * EIGHTS * 8
    eight = tl.arange(0, EIGHTS)[:, None] * 8
    column = eight + tl.arange(0, 8)[None, :]
    inside = first + eight < TOTAL
    word = first // 8 + (column // GROUP * EIGHTH + column % EIGHTH)
    tile = tl.load(words + word, mask=inside, other=0)
    pair = scales + (first // GROUP + eight // GROUP) * 2
    scale = tl.load(pair, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(pair + 1, mask=inside, other=0.0).to(tl.float32) - 24.0 * scale
    bits = (((tile >> (4 * (column // EIGHTH % 8))) & 15) << 19) | 0x3F800000
    weights = bits.to(tl.float32, bitcast=True) * (16.0 * scale) + offset
    tl.store(out + first + column, weights.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _widen8(codes, scales, out, TOTAL, K: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < TOTAL
    scale = tl.load(scales + at // K, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(codes + at, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)


def widen(codes: Tensor, scales: Tensor, group: int, out_NK: Tensor) -> Tensor:
    """Fills `out_NK`, contiguous, with the weights. → it."""
    total = out_NK.numel()
    if group:
        grid = (triton.cdiv(total, 8 * EIGHTS),)
        _widen4[grid](codes.view(torch.int32), scales, out_NK, total, GROUP=group, EIGHTS=EIGHTS, num_warps=8)
    else:
        block = 2048
        _widen8[(triton.cdiv(total, block),)](codes, scales, out_NK, total, K=out_NK.shape[1], BLOCK=block)
    return out_NK


def widened(
    x_MK: Tensor, codes: Tensor, scales: Tensor, bias_N: Tensor | None, group: int, at_once: int
) -> Tensor:
    """x @ weight.T + bias by cuBLAS, so many weights widened at once."""

    def fill(rows: slice, room: Tensor) -> None:
        widen(codes[rows], scales[rows], group, room)

    return in_pieces(x_MK, len(codes), fill, bias_N, at_once)


EVEN = 256
"""Pieces begin at multiples: to an odd column of the output cuBLAS writes by kernels of single numbers, which took
2.3 ms for 275 GFLOP (2048 rows, 4681 channels, 14336 columns; H100, 2026-11-22), six times as long as its others."""


def piece(n: int, k: int, at_once: int) -> int:
    """Rows of so many that are widened at once: all pieces but the last are alike, and it is hardly shorter."""
    most = max(1, at_once // k)
    unit = EVEN if most >= EVEN else 1
    pieces = -(-n // (most - most % unit))
    return -(-n // (pieces * unit)) * unit


def in_pieces(
    x_MK: Tensor, n: int, fill: Callable[[slice, Tensor], None], bias_N: Tensor | None, at_once: int
) -> Tensor:
    """x @ weight.T + bias by cuBLAS: `fill` puts some rows of the weight, of `n`, into memory, `at_once` numbers."""
    m, k = x_MK.shape
    step = piece(n, k, at_once)
    room = torch.empty((min(step, n), k), dtype=x_MK.dtype, device=x_MK.device)
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        wide = room[: rows.stop - start]
        fill(rows, wide)
        torch.mm(x_MK, wide.t(), out=out[:, rows])
    return out if bias_N is None else out.add_(bias_N)
