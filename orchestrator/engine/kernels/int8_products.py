"""Products of int8 by int8: each row of x scaled by its largest, as it comes; sums exact in int32.

Dimensions: M rows of x, N output channels, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orchestrator.engine.kernels.rounding import rounded
from orchestrator.engine.small_rows import Rows

LEAST_ROWS = 17
"""Fewer go by the weights alone, widened: they are bound by reading these, and cuBLAS wants no less."""


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


def takes_int8(x_MK: Rows, codes_NK: Tensor) -> bool:
    """cuBLAS wants eights of columns and channels."""
    return len(x_MK) >= LEAST_ROWS and codes_NK.shape[1] % 8 == 0 and len(codes_NK) % 8 == 0


def int8_by_int8(x_MK: Rows, codes_NK: Tensor, scales_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """x @ weight.T + bias → [M, N] in x's dtype."""
    small = rounded(x_MK, torch.int8)
    m, n = len(small.codes_MK), len(codes_NK)
    sums = torch._int_mm(small.codes_MK, codes_NK.t())
    out = torch.empty((m, n), dtype=small.dtype, device=codes_NK.device)
    block = 1024
    _scaled[(triton.cdiv(n, block), m)](
        sums, small.scales_M, scales_N, out if bias_N is None else bias_N, out, n,
        HAS_BIAS=bias_N is not None, BLOCK=block,
    )  # fmt: skip
    return out
