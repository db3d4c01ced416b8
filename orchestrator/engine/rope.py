"""Rotary position embedding with linear, llama3 and YaRN scaling.

Formulas: RoPE, Su et al. 2104.09864; YaRN, Peng et al. 2309.00071; llama3 from Meta's reference code. Each equals
transformers' `ROPE_INIT_FUNCTIONS` (the tests compare).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from strategies.spec import RopeSpec


class Rope:
    def __init__(self, spec: RopeSpec, head_dim: int, max_positions: int) -> None:
        self.frequencies, self.scale = frequencies(spec, head_dim, max_positions)

    def on(self, device: torch.device) -> Tensor:
        """The frequencies, there from now on."""
        self.frequencies = self.frequencies.to(device)
        return self.frequencies

    def __call__(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """→ cos, sin: [T, 1, D], computed in float32, in `dtype`."""
        angles = positions_T.float().unsqueeze(-1) * self.on(positions_T.device)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def frequencies(spec: RopeSpec, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """→ radians a position turns each pair of dimensions by [head_dim / 2], and the factor on cos and sin."""
    # On the CPU by name: the model around it may be under construction on the meta device.
    base = 1.0 / spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if spec.kind == "linear":
        return base / spec.factor, 1.0
    if spec.kind == "llama3":
        return _llama3(base, spec), 1.0
    if spec.kind == "yarn":
        return _yarn(base, spec, head_dim, max_positions)
    return base, 1.0


def _llama3(base: Tensor, spec: RopeSpec) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / base
    turns = spec.original_max_positions / wavelengths
    smooth = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * base / spec.factor + smooth * base


def _yarn(base: Tensor, spec: RopeSpec, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    original = spec.original_max_positions or max_positions

    def dimension_turning(turns: float) -> float:
        """The dimension whose pair turns `turns` times over the original context."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = dimension_turning(spec.beta_fast), dimension_turning(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    return base / spec.factor * ramp + base * (1 - ramp), _yarn_attention(spec)


def _yarn_attention(spec: RopeSpec) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if spec.factor <= 1 else 0.1 * mscale * math.log(spec.factor) + 1.0

    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return scale(spec.mscale) / scale(spec.mscale_all_dim)
    return scale(1.0)
