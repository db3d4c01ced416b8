"""Products of int8 by int8: each row of x scaled by its largest, as it comes; sums exact in int32.

Dimensions: M rows of x, N output channels, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 127.0
LEAST_ROWS = 17
"""Fewer go by the weights alone, widened: they are bound by reading these, and cuBLAS wants no less."""
_ROUNDER = tl.constexpr(
    12582912.0
)  # 1.5 × 2**23: what is added to it is rounded to whole numbers, halves to even


@triton.jit
def _to_int8(x, small, scales, K: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr):
    """A program has one row, read twice: the second time from cache."""
    row = tl.program_id(0).to(tl.int64) * K
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, K, BLOCK):
        some = tl.load(x + row + start + column, mask=start + column < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(some))
    scale = tl.maximum(tl.max(largest, axis=0) / MOST, 1e-12)
    tl.store(scales + tl.program_id(0), scale)
    for start in tl.range(0, K, BLOCK):
        inside = start + column < K
        some = tl.load(x + row + start + column, mask=inside, other=0.0).to(tl.float32) / scale
        whole = (tl.minimum(tl.maximum(some, -MOST), MOST) + _ROUNDER) - _ROUNDER
        tl.store(small + row + start + column, whole.to(tl.int8), mask=inside)


@triton.jit
def _scaled(sums, row_scales, scales, bias, out, N, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """One row, some channels."""
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    total = tl.load(sums + row * N + n, mask=inside, other=0).to(tl.float32)
    total *= tl.load(row_scales + row) * tl.load(scales + n, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=inside)


def to_int8(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """→ int8 [M, K]; scales, float32 [M]."""
    m, k = x_MK.shape
    small_MK = torch.empty((m, k), dtype=torch.int8, device=x_MK.device)
    scales_M = torch.empty(m, dtype=torch.float32, device=x_MK.device)
    block = min(4096, triton.next_power_of_2(k))
    _to_int8[(m,)](x_MK, small_MK, scales_M, K=k, BLOCK=block, MOST=MOST, num_warps=max(1, block // 512))
    return small_MK, scales_M


def takes_int8(x_MK: Tensor, codes_NK: Tensor) -> bool:
    """cuBLAS wants eights of columns and channels."""
    return len(x_MK) >= LEAST_ROWS and x_MK.shape[1] % 8 == 0 and len(codes_NK) % 8 == 0


def int8_by_int8(x_MK: Tensor, codes_NK: Tensor, scales_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """x @ weight.T + bias → [M, N] in x's dtype."""
    m, n = len(x_MK), len(codes_NK)
    small_MK, row_scales_M = to_int8(x_MK)
    sums = torch._int_mm(small_MK, codes_NK.t())
    out = torch.empty((m, n), dtype=x_MK.dtype, device=x_MK.device)
    block = 1024
    _scaled[(triton.cdiv(n, block), m)](
        sums, row_scales_M, scales_N, out if bias_N is None else bias_N, out, n,
        HAS_BIAS=bias_N is not None, BLOCK=block,
    )  # fmt: skip
    return out
