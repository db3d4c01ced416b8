"""What a layer does between its products, and the products: by Triton's kernels on a GPU, by torch everywhere else.

Each function gives the same numbers either way, up to the order of summation. float64, which serves as the truth that
other dtypes are measured against, always goes through torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.engine.small_rows import Rows
from strategies.scheme import W8A8, Scheme


def has_kernels(x: Rows) -> bool:
    return x.is_cuda and x.dtype != torch.float64


def overlaps(x: Tensor) -> bool:
    """Whether a kernel on x's device may begin while the one before it still runs (kernels/overlap.py)."""
    return bool(_kernels().supported(x.device))


@cache
def _kernels() -> Any:
    """Imported only where there is a use for them: Triton comes with torch's CUDA build, not with the one for CPUs."""
    return import_module("orchestrator.engine.kernels.all")


def rows_by_kernel(x_MK: Tensor, codes: Tensor, scales: Tensor, how: Scheme) -> list[int]:
    """Of a quantized product on a GPU: the fewest rows that choose another kernel, or another tile."""
    fewest: list[int] = _kernels().rows_by_kernel(x_MK, codes, scales, how.group)
    return fewest


def add_rms_norm(
    x_TE: Tensor, residual_TE: Tensor | None, weight_E: Tensor, eps: float, small: torch.dtype | None = None
) -> tuple[Rows, Tensor]:
    """→ norm(x + residual), in `small` if that is given, and x + residual. Both arguments may be written over."""
    if has_kernels(x_TE):
        both: tuple[Rows, Tensor] = _kernels().add_rms_norm(
            x_TE, residual_TE, weight_E, eps, small, pdl=overlaps(x_TE)
        )
        return both
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


@dataclass(frozen=True, slots=True)
class Way:
    """What makes a layer's product, of so many rows of x and a weight without bias (product_choice.py)."""

    rows: range
    product: Callable[[Tensor, Tensor], Tensor]


Ways = tuple[Way, ...]


def _way(ways: Ways, x_TE: Tensor) -> Way | None:
    return next((way for way in ways if len(x_TE) in way.rows), None)


def linear(x_TE: Tensor, weight_NE: Tensor, bias_N: Tensor | None, ways: Ways = ()) -> Tensor:
    """One or two rows are bound by reading the weights, where our kernel is faster than cuBLAS; more, by `ways`."""
    if has_kernels(x_TE) and len(x_TE) <= _kernels().MAX_ROWS:
        out: Tensor = _kernels().gemv(x_TE, weight_NE, bias_N, pdl=overlaps(x_TE))
        return out
    way = _way(ways, x_TE)
    return F.linear(x_TE, weight_NE, bias_N) if way is None else way.product(x_TE, weight_NE)


def gate_up(x_TE: Tensor, weight_NE: Tensor, bias_N: Tensor | None, ways: Ways = ()) -> Tensor:
    """silu(gate) · up, where gate is the first half of the product's columns and up the second."""
    way = _way(ways, x_TE)
    if way is not None:
        return way.product(x_TE, weight_NE)
    if has_kernels(x_TE):
        few = len(x_TE) <= _kernels().MAX_ROWS
        out: Tensor = (
            _kernels().gate_up(x_TE, weight_NE, bias_N, pdl=overlaps(x_TE))
            if few
            else _kernels().silu_mul(F.linear(x_TE, weight_NE, bias_N), pdl=overlaps(x_TE))
        )
        return out
    gate, up = F.linear(x_TE, weight_NE, bias_N).chunk(2, dim=-1)
    return F.silu(gate) * up


def rounds_to(x_MK: Rows, codes: Tensor, how: Scheme) -> torch.dtype | None:
    """What a product by such weights takes x's rows in, on a GPU; None: in their own dtype."""
    if how.format == W8A8 and _kernels().takes_int8(x_MK, codes):
        return torch.int8
    return torch.float8_e4m3fn if _kernels().takes_float8(x_MK, codes) else None


def quantized_linear(x_MK: Rows, codes: Tensor, scales: Tensor, bias_N: Tensor | None, how: Scheme) -> Tensor:
    """On a GPU, by weights as quantized.py keeps them."""
    small = rounds_to(x_MK, codes, how)
    if small is not None:
        by = _kernels().int8_by_int8 if small == torch.int8 else _kernels().float8_by_float8
        product: Tensor = by(x_MK, codes, scales, bias_N)
        return product
    assert isinstance(x_MK, Tensor), "rows in 8 bits are for products that take them"
    if how.group and how.bits == 8:
        of_groups: Tensor = _kernels().groups_of_8(x_MK, codes, scales, bias_N, pdl=overlaps(x_MK))
        return of_groups
    out: Tensor = _kernels().quantized(x_MK, codes, scales, bias_N, how.group, pdl=overlaps(x_MK))
    return out


def quantized_gate_up(
    x_MK: Rows,
    codes: Tensor,
    scales: Tensor,
    bias_N: Tensor | None,
    how: Scheme,
    small: torch.dtype | None = None,
) -> Rows:
    """Rows in `small`, if that is given."""
    if how.group and how.bits == 4:
        assert isinstance(x_MK, Tensor), "rows in 8 bits are for products that take them"
        out: Tensor = _kernels().quantized_gate_up(x_MK, codes, scales, bias_N, how.group, pdl=overlaps(x_MK))
        return out
    both_MN = quantized_linear(x_MK, codes, scales, bias_N, how)
    if small is None:
        return gated(both_MN)
    rows: Rows = _kernels().silu_mul_small(both_MN, small)
    return rows


def gated(both_MN: Tensor) -> Tensor:
    """silu(gate) · up of a product that has both."""
    if has_kernels(both_MN):
        out: Tensor = _kernels().silu_mul(both_MN, pdl=overlaps(both_MN))
        return out
    gate_MN, up_MN = both_MN.chunk(2, dim=-1)
    return F.silu(gate_MN) * up_MN


def argmax(logits_RV: Tensor) -> Tensor:
    """The likeliest token of each row, int64; the lowest of equals."""
    if has_kernels(logits_RV):
        out: Tensor = _kernels().argmax(logits_RV, pdl=overlaps(logits_RV))
        return out
    return logits_RV.argmax(dim=-1)


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotary embedding over halves of the head dimension, as the Hugging Face checkpoints are laid out."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D
