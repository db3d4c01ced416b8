"""What a layer does between its products, and the products: by Triton's kernels on a GPU, by torch everywhere else.

Each function gives the same numbers either way, up to the order of summation. float64, which serves as the truth that
other dtypes are measured against, always goes through torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def has_kernels(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def add_rms_norm(
    x_TE: Tensor, residual_TE: Tensor | None, weight_E: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """→ norm(x + residual), x + residual. Both arguments may be written over."""
    if has_kernels(x_TE):
        from orchestrator.engine.kernels import norm

        return norm.add_rms_norm(x_TE, residual_TE, weight_E, eps)
    if residual_TE is not None:
        x_TE = x_TE + residual_TE
    return rms_norm(x_TE, weight_E, eps), x_TE


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, in torch."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    if x.is_cuda:
        normed = F.rms_norm(wide, weight.shape, None, eps)
    else:  # where torch takes rms_norm apart into twenty calls, 83 µs for one token; mean is five of them
        mean_square = wide.square().sum(dim=-1, keepdim=True) * (1 / wide.shape[-1])
        normed = wide * torch.rsqrt(mean_square + eps)
    # In half precision the weight multiplies after rounding, as the reference implementations do.
    return normed.to(x.dtype) * weight


def linear(x_TE: Tensor, weight_NE: Tensor, bias_N: Tensor | None) -> Tensor:
    """A few rows are bound by reading the weights, where our kernel is faster than cuBLAS."""
    if has_kernels(x_TE):
        from orchestrator.engine.kernels import gemv

        if len(x_TE) <= gemv.MAX_ROWS:
            return gemv.gemv(x_TE, weight_NE, bias_N)
    return F.linear(x_TE, weight_NE, bias_N)


def gate_up(x_TE: Tensor, weight_NE: Tensor, bias_N: Tensor | None) -> Tensor:
    """silu(gate) · up, where gate is the first half of the product's columns and up the second."""
    if has_kernels(x_TE):
        from orchestrator.engine.kernels import activation, gemv

        if len(x_TE) <= gemv.MAX_ROWS:
            return gemv.gate_up(x_TE, weight_NE, bias_N)
        return activation.silu_mul(F.linear(x_TE, weight_NE, bias_N))
    gate, up = F.linear(x_TE, weight_NE, bias_N).chunk(2, dim=-1)
    return F.silu(gate) * up


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotary embedding over halves of the head dimension, as the Hugging Face checkpoints are laid out."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D
