"""Codes of four bits, by rounding to nearest or with error feedback (GPTQ, Frantar et al. 2022, arXiv 2210.17323).

w = (code − zero point) × scale, whole zero points, in groups of columns. Rounding to nearest looks at the weights
alone. With H = Σ x xᵀ of what the layer reads, each column's error is made good by the columns not yet rounded, those
that weigh most first, and a group's range is the one that costs least of many. Scales and zero points are chosen before
columns move, so that the order need not be kept with the weights.

Dimensions: N output channels, K columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOST_CODE = 15
DAMPING = 0.01  # of H's mean diagonal
BLOCK = 128  # columns between two updates of all that are left
SHRINKS = tuple(1 - 0.02 * step for step in range(26))  # of a group's range, tried


@dataclass(frozen=True, slots=True)
class Codes:
    codes_NK: Tensor  # uint8, 0 to 15
    scales_NG: Tensor  # in the dtype that they are stored in
    zero_points_NG: Tensor  # uint8, 0 to 15

    def dequantized(self) -> Tensor:
        """float32."""
        n, k = self.codes_NK.shape
        groups = self.codes_NK.view(n, self.scales_NG.shape[1], -1).float()
        wide = (groups - self.zero_points_NG.float()[:, :, None]) * self.scales_NG.float()[:, :, None]
        return wide.view(n, k)

    def rows(self, rows: slice) -> Codes:
        return Codes(self.codes_NK[rows], self.scales_NG[rows], self.zero_points_NG[rows])


def to_nearest(weight_NK: Tensor, group: int, dtype: torch.dtype) -> Codes:
    n, k = weight_NK.shape
    groups = weight_NK.float().view(n, k // group, group)
    scales, points = _ranges(groups.amin(2), groups.amax(2), 1.0, dtype)
    return Codes(_codes(groups, scales, points).view(n, k).to(torch.uint8), scales, points.to(torch.uint8))


def with_feedback(weight_NK: Tensor, hessian_KK: Tensor, group: int, dtype: torch.dtype) -> Codes:
    """float32 weights and H, of one device. A column that was never read is rounded to nearest."""
    n, k = weight_NK.shape
    left_NK, hessian_KK = weight_NK.float().clone(), hessian_KK.clone()
    diagonal_K = hessian_KK.diagonal()
    diagonal_K[diagonal_K == 0] = 1
    diagonal_K += DAMPING * diagonal_K.mean()
    scales, points = _searched(left_NK.view(n, k // group, group), diagonal_K.view(-1, group), dtype)
    order_K = diagonal_K.argsort(descending=True)
    inverse_KK = _upper_inverse(hessian_KK[order_K][:, order_K])
    left_NK = left_NK[:, order_K]
    of_group_K = order_K // group
    codes_NK = torch.empty((n, k), dtype=torch.uint8, device=weight_NK.device)
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        errors = torch.empty((n, stop - start), device=weight_NK.device)
        for column in range(start, stop):
            at = int(of_group_K[column])
            scale, point = scales[:, at].float(), points[:, at]
            code = (left_NK[:, column] / scale + point).round_().clamp_(0, MOST_CODE)
            codes_NK[:, column] = code.to(torch.uint8)
            error = (left_NK[:, column] - (code - point) * scale) / inverse_KK[column, column]
            left_NK[:, column:stop] -= error[:, None] * inverse_KK[column, column:stop]
            errors[:, column - start] = error
        left_NK[:, stop:] -= errors @ inverse_KK[start:stop, stop:]
    back_K = order_K.argsort()
    return Codes(codes_NK[:, back_K].contiguous(), scales, points.to(torch.uint8))


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
