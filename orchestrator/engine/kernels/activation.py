"""SiLU(gate) × up over the product of a gate-up matrix.

Dimensions: T tokens, N rows of the gate-up matrix, the gate's N/2 first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orchestrator.engine.kernels.rounding import MOST, in_8_bits, room_for, scale_of
from orchestrator.engine.small_rows import SmallRows

BLOCK = 1024  # outputs of a program: at 4 warps 8 a thread, so loads of 16 bytes in half precision


@triton.jit
def _silu_mul(gate_up, out, HALF: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HALF
    if PDL:
        tl.extra.cuda.gdc_wait()
    gate = tl.load(gate_up + row * 2 * HALF + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * HALF + HALF + column, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * HALF + column, result.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up_TN: Tensor, *, pdl: bool = False) -> Tensor:
    """→ [T, N/2]. Contiguous; maths in float32, rounded once (torch rounds SiLU's result too)."""
    tokens, rows = gate_up_TN.shape
    half = rows // 2
    out = torch.empty((tokens, half), dtype=gate_up_TN.dtype, device=gate_up_TN.device)
    grid = (tokens, triton.cdiv(half, BLOCK))
    _silu_mul[grid](gate_up_TN, out, HALF=half, BLOCK=BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl)
    return out


@triton.jit
def _silu_mul_small(
    gate_up, small, scales, HALF: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, WHOLE: tl.constexpr
):
    """A program has one row, which it holds in registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    gate = tl.load(gate_up + row * 2 * HALF + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * HALF + HALF + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    result = (wide / (1.0 + tl.exp(-wide)) * up.to(tl.float32)).to(gate.dtype).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(result), axis=0), MOST)
    tl.store(scales + row, scale)
    code = in_8_bits(result, scale, MOST, WHOLE)
    tl.store(small + row * HALF + column, code.to(small.dtype.element_ty), mask=inside)


def silu_mul_small(gate_up_TN: Tensor, dtype: torch.dtype) -> SmallRows:
    """The same rows in 8 bits, as if `silu_mul` had written them and `rounded` read them."""
    tokens, half = gate_up_TN.shape[0], gate_up_TN.shape[1] // 2
    small = room_for(gate_up_TN, half, dtype)
    block = triton.next_power_of_2(half)
    _silu_mul_small[(tokens,)](
        gate_up_TN, small.codes_MK, small.scales_M,
        HALF=half, BLOCK=block, MOST=MOST[dtype], WHOLE=dtype == torch.int8,
        num_warps=min(32, max(4, block // 512)),
    )  # fmt: skip
    return small
