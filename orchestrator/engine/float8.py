"""Codes in float8 (e4m3) with a scale a channel, by rounding to nearest or with error feedback, as gptq.py's.

A float's error is a share of the number whatever the scale: 2.65 % root mean square of normal numbers for each of
sixteen scales of an octave. Which columns round well depends on it, though, and with H's diagonal to weigh them one
scale costs less than another. Products of many rows have x in float8 too, which nothing here can make good.

Dimensions: N output channels, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.engine.gptq import damped, fed_back
from orchestrator.engine.quantized import FP8_MOST, channel_scales, quantize_channels
from orchestrator.engine.stored import StoredCodes

PHASES = tuple(2 ** (step / 16) for step in range(16))
"""Times the least scale, tried: further on the codes are the same but for the smallest."""


def to_nearest(weight_NK: Tensor, dtype: torch.dtype) -> StoredCodes:
    """`dtype`: of the scales."""
    wide_NK = weight_NK.float()
    scales_N = channel_scales(wide_NK, "fp8", dtype)
    return StoredCodes(quantize_channels(wide_NK, scales_N, "fp8"), scales_N.unsqueeze(1), None)


def with_feedback(weight_NK: Tensor, hessian_KK: Tensor, dtype: torch.dtype) -> StoredCodes:
    """float32 weights and H, of one device. A column that was never read is rounded to nearest."""
    damped_KK = damped(hessian_KK)
    scales_N = _searched(weight_NK.float(), damped_KK.diagonal(), dtype)
    wide_N = scales_N.float()

    def rounded(_column: int, left_N: Tensor) -> tuple[Tensor, Tensor]:
        code = (left_N / wide_N).clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn).float()
        return code, code * wide_N

    codes_NK = fed_back(weight_NK, damped_KK, rounded).to(torch.float8_e4m3fn)
    return StoredCodes(codes_NK, scales_N.unsqueeze(1), None)


def _searched(wide_NK: Tensor, weights_K: Tensor, dtype: torch.dtype) -> Tensor:
    """Of each channel the scale whose rounding costs least, each column's error as H's diagonal weighs it."""
    least_N = channel_scales(wide_NK, "fp8", torch.float32)
    found_N = least_N.to(dtype)
    best_N = torch.full_like(least_N, torch.inf)
    for phase in PHASES:
        scales_N = (least_N * phase).to(dtype)
        rounded = quantize_channels(wide_NK, scales_N, "fp8").float() * scales_N.float().unsqueeze(1)
        cost_N = ((rounded - wide_NK).square() * weights_K).sum(1)
        better = cost_N < best_N
        best_N = torch.where(better, cost_N, best_N)
        found_N = torch.where(better, scales_N, found_N)
    return found_N
