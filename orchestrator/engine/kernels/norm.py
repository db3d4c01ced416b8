"""RMSNorm, and the residual addition before it, in one pass over the hidden states.

Dimensions: T tokens, E hidden size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from orchestrator.engine.kernels.rounding import MOST, in_8_bits, room_for, scale_of
from orchestrator.engine.small_rows import Rows

FEW_TOKENS = 64  # up to here the GPU is not full, and a row is the faster the more warps share it


@triton.jit
def _add_rms_norm(
    x,
    residual,
    weight,
    normed,
    scales,
    EPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    MOST: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program a row, which it holds in registers: each element is read once. MOST: of 8 bits; 0: not in these."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    element = tl.program_id(0).to(tl.int64) * SIZE + column
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(x + element, mask=inside, other=0.0)
    if ADD:
        total = value.to(tl.float32) + tl.load(residual + element, mask=inside, other=0.0).to(tl.float32)
        value = total.to(value.dtype)
        tl.store(residual + element, value, mask=inside)
    wide = value.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=0) / SIZE
    wide = (wide * (1.0 / tl.sqrt_rn(mean_square + EPS))).to(value.dtype).to(tl.float32)
    result = (wide * scale).to(value.dtype)
    if MOST > 0:
        wide = result.to(tl.float32)
        of_row = scale_of(tl.max(tl.abs(wide), axis=0), MOST)
        tl.store(scales + tl.program_id(0), of_row)
        code = in_8_bits(wide, of_row, MOST, WHOLE)
        tl.store(normed + element, code.to(normed.dtype.element_ty), mask=inside)
    else:
        tl.store(normed + element, result, mask=inside)


def add_rms_norm(
    x_TE: Tensor,
    residual_TE: Tensor | None,
    weight_E: Tensor,
    eps: float,
    small: torch.dtype | None = None,
    *,
    pdl: bool = False,
) -> tuple[Rows, Tensor]:
    """→ RMSNorm(x + residual), in `small` if that is given, and x + residual. Contiguous tensors of one dtype.

    The sum is written over `residual_TE`, which is returned; without a residual, x itself is. Maths in float32; the
    sum is rounded to the dtype, the normed value before the weight multiplies it: as transformers rounds.
    """
    tokens, size = x_TE.shape
    rows = None if small is None else room_for(x_TE, size, small)
    normed_TE = torch.empty_like(x_TE) if rows is None else rows.codes_MK
    block = triton.next_power_of_2(size)
    elements = (
        8 if tokens <= FEW_TOKENS else 16
    )  # a thread's: loads of 16 bytes, one or two in flight for each tensor
    _add_rms_norm[(tokens,)](
        x_TE,
        x_TE if residual_TE is None else residual_TE,
        weight_E,
        normed_TE,
        normed_TE if rows is None else rows.scales_M,
        EPS=eps,
        SIZE=size,
        BLOCK=block,
        ADD=residual_TE is not None,
        MOST=0.0 if small is None else MOST[small],
        WHOLE=small == torch.int8,
        PDL=pdl,
        num_warps=min(16, max(1, block // (32 * elements))),
        launch_pdl=pdl,
    )
    return rows or normed_TE, x_TE if residual_TE is None else residual_TE
