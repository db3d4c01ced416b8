"""Rows of x in 8 bits, each scaled by its largest as it comes: for products of int8 by int8 and of float8 by float8."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orchestrator.engine.small_rows import Rows, SmallRows

MOST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_ROUNDER = tl.constexpr(
    12582912.0
)  # 1.5 × 2**23: what is added to it is rounded to whole numbers, halves to even


@triton.jit
def scale_of(largest, MOST: tl.constexpr):
    return tl.maximum(tl.div_rn(largest, MOST), 1e-12)


@triton.jit
def in_8_bits(some, scale, MOST: tl.constexpr, WHOLE: tl.constexpr):
    """Float32 that a store turns into the codes' dtype."""
    some = tl.div_rn(some, scale)  # as everywhere else: of numbers of eight bits, many lie half way
    some = tl.minimum(tl.maximum(some, -MOST), MOST)
    if WHOLE:
        some = (some + _ROUNDER) - _ROUNDER
    return some


@triton.jit
def _rounded(x, small, scales, K: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr):
    """A program has one row, read twice: the second time from cache."""
    row = tl.program_id(0).to(tl.int64) * K
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, K, BLOCK):
        some = tl.load(x + row + start + column, mask=start + column < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(some))
    scale = scale_of(tl.max(largest, axis=0), MOST)
    tl.store(scales + tl.program_id(0), scale)
    for start in tl.range(0, K, BLOCK):
        inside = start + column < K
        some = tl.load(x + row + start + column, mask=inside, other=0.0).to(tl.float32)
        code = in_8_bits(some, scale, MOST, WHOLE)
        tl.store(small + row + start + column, code.to(small.dtype.element_ty), mask=inside)


def room_for(x_MN: Tensor, columns: int, dtype: torch.dtype) -> SmallRows:
    """As many rows as x has, not written yet."""
    codes_MK = torch.empty((len(x_MN), columns), dtype=dtype, device=x_MN.device)
    return SmallRows(codes_MK, torch.empty(len(x_MN), dtype=torch.float32, device=x_MN.device), x_MN.dtype)


def rounded(x_MK: Rows, dtype: torch.dtype) -> SmallRows:
    """To int8 or e4m3, unless whoever wrote x has done it."""
    if isinstance(x_MK, SmallRows):
        assert x_MK.codes_MK.dtype == dtype, f"rows in {x_MK.codes_MK.dtype} for a product of {dtype}"
        return x_MK
    m, k = x_MK.shape
    small = room_for(x_MK, k, dtype)
    block = min(4096, triton.next_power_of_2(k))
    _rounded[(m,)](
        x_MK, small.codes_MK, small.scales_M,
        K=k, BLOCK=block, MOST=MOST[dtype], WHOLE=dtype == torch.int8, num_warps=max(1, block // 512),
    )  # fmt: skip
    return small
