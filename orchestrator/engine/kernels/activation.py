"""SiLU(gate) × up over the product of a gate-up matrix.

Dimensions: T tokens, N rows of the gate-up matrix, the gate's N/2 first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
