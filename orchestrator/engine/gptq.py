"""Codes of four bits, by rounding to nearest or with error feedback (GPTQ, Frantar et al. 2022, arXiv 2210.17323).

w = (code − zero point) × scale, whole zero points, in groups of columns. Rounding to nearest looks at the weights
alone. With H = Σ x xᵀ of what the layer reads, each column's error is made good by the columns not yet rounded, those
that weigh most first, and a group's range is the one that costs least of many. Scales and zero points are chosen before
columns move, so that the order need not be kept with the weights. float8.py does the same for another grid.

Dimensions: N output channels, K columns, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from orchestrator.engine.stored import StoredCodes

MOST_CODE = 15
DAMPING = 0.01  # of H's mean diagonal
BLOCK = 128  # columns between two updates of all that are left
SHRINKS = tuple(1 - 0.02 * step for step in range(26))  # of a group's range, tried

Rounded = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Of a column, by its place, what it has become [N]: its codes, float32, and the values that they stand for."""


def to_nearest(weight_NK: Tensor, group: int, dtype: torch.dtype) -> StoredCodes:
    n, k = weight_NK.shape
    groups = weight_NK.float().view(n, k // group, group)
    scales, points = _ranges(groups.amin(2), groups.amax(2), 1.0, dtype)
    codes_NK = _codes(groups, scales, points).view(n, k)
    return StoredCodes(codes_NK.to(torch.uint8), scales, points.to(torch.uint8))


def with_feedback(weight_NK: Tensor, hessian_KK: Tensor, group: int, dtype: torch.dtype) -> StoredCodes:
    """float32 weights and H, of one device. A column that was never read is rounded to nearest."""
    n, k = weight_NK.shape
    damped_KK = damped(hessian_KK)
    groups = weight_NK.float().view(n, k // group, group)
    scales, points = _searched(groups, damped_KK.diagonal().view(-1, group), dtype)

    def rounded(column: int, left_N: Tensor) -> tuple[Tensor, Tensor]:
        scale, point = scales[:, column // group].float(), points[:, column // group]
        code = (left_N / scale + point).round_().clamp_(0, MOST_CODE)
        return code, (code - point) * scale

    codes_NK = fed_back(weight_NK, damped_KK, rounded)
    return StoredCodes(codes_NK.to(torch.uint8), scales, points.to(torch.uint8))


def damped(hessian_KK: Tensor) -> Tensor:
    """That can be inverted: columns that were never read weigh something too."""
    hessian_KK = hessian_KK.clone()
    diagonal_K = hessian_KK.diagonal()
    diagonal_K[diagonal_K == 0] = 1
    diagonal_K += DAMPING * diagonal_K.mean()
    return hessian_KK


def fed_back(weight_NK: Tensor, damped_KK: Tensor, rounded: Rounded) -> Tensor:
    """Codes of all columns, float32 [N, K], each column rounded as those before it have left it."""
    n, k = weight_NK.shape
    order_K = damped_KK.diagonal().argsort(descending=True)
    places = order_K.tolist()
    inverse_KK = _upper_inverse(damped_KK[order_K][:, order_K])
    left_NK = weight_NK.float()[:, order_K]
    codes_NK = torch.empty((n, k), device=weight_NK.device)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.empty((n, stop - start), device=weight_NK.device)
        for column in range(start, stop):
            code, value = rounded(places[column], left_NK[:, column])
            codes_NK[:, column] = code
            error = (left_NK[:, column] - value) / inverse_KK[column, column]
            left_NK[:, column:stop] -= error[:, None] * inverse_KK[column, column:stop]
            errors[:, column - start] = error
        left_NK[:, stop:] -= errors @ inverse_KK[start:stop, stop:]
    return codes_NK[:, order_K.argsort()].contiguous()


def _upper_inverse(hessian_KK: Tensor) -> Tensor:
    """The Cholesky factor U of H's inverse, UᵀU: row k tells how later columns make good for column k."""
    lower = torch.linalg.cholesky(hessian_KK)
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper


def _ranges(least: Tensor, most: Tensor, shrink: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales as stored and whole zero points (float32) of ranges that hold zero."""
    least, most = least.clamp(max=0) * shrink, most.clamp(min=0) * shrink
    scales = ((most - least) / MOST_CODE).to(dtype)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales, (-least / scales.float()).round_().clamp_(0, MOST_CODE)


def _codes(groups: Tensor, scales: Tensor, points: Tensor) -> Tensor:
    ratios = groups / scales.float().unsqueeze(2) + points.unsqueeze(2)
    return ratios.round_().clamp_(0, MOST_CODE)


def _searched(groups: Tensor, weights_GC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each group the range whose rounding costs least, each column's error as H's diagonal weighs it."""
    least, most = groups.amin(2), groups.amax(2)
    found_scales, found_points = _ranges(least, most, 1.0, dtype)
    best = torch.full_like(least, torch.inf)
    for shrink in SHRINKS:
        scales, points = _ranges(least, most, shrink, dtype)
        rounded = (_codes(groups, scales, points) - points.unsqueeze(2)) * scales.float().unsqueeze(2)
        cost = ((rounded - groups).square() * weights_GC).sum(2)
        better = cost < best
        best = torch.where(better, cost, best)
        found_scales = torch.where(better, scales, found_scales)
        found_points = torch.where(better, points, found_points)
    return found_scales, found_points
