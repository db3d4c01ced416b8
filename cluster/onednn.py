"""Products by a weight on a CPU: oneDNN's, with the weight packed once.

torch's own pack the weight anew in each product of a few rows, by one thread. SmolLM2-135M's products in float32 on
two cores (AMD EPYC with AVX-512, torch 2.13, 2026-11-23), ms of a step of 1, 4, 16, 64 rows: torch's 53, 78, 91, 202,
these 32, 31, 41, 109; four rows read the head's weights at 25 GB/s, by torch's product at 6. bfloat16 gains as much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)  # float16 wants newer instructions, float64 has none

_ROWS = 16
"""Of the products to come: told of one, oneDNN leaves the weight as it is, and reads it at two thirds of the rate."""

_onednn: Any = torch.ops.mkldnn


def has_packed(dtype: torch.dtype) -> bool:
    """Whether this build of torch brings such products."""
    return dtype in DTYPES and torch._C._has_mkldnn and hasattr(_onednn, "_linear_pointwise")


def packed(weight_NK: Tensor) -> Tensor:
    """A copy in oneDNN's order of blocks, which only `product` can read."""
    copy: Tensor = _onednn._reorder_linear_weight(weight_NK, _ROWS)
    return copy


def product(x_MK: Tensor, packed_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias. The first of a number of rows takes a millisecond more, in which its kernel is made."""
    out: Tensor = _onednn._linear_pointwise(x_MK, packed_NK, bias_N, "none", [], "")
    return out


def prepared(weight_NK: Tensor) -> Callable[[Tensor], Tensor]:
    """x → x @ weight.T as the engine multiplies on a device of the weight's kind."""
    if weight_NK.device.type == "cpu" and has_packed(weight_NK.dtype):
        copy = packed(weight_NK)
        return lambda x_MK: product(x_MK, copy)
    return lambda x_MK: F.linear(x_MK, weight_NK)
