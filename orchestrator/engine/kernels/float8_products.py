"""Products of float8 by float8: each row of x scaled by its largest, as it comes.

Dimensions: M rows of x, N output channels, K columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orchestrator.engine.kernels.rounding import rounded
from orchestrator.engine.quantized import FLOAT8_ROWS, multiplies_float8
from orchestrator.engine.small_rows import Rows

LEAST_ROWS = FLOAT8_ROWS + 1


def takes_float8(x_MK: Rows, codes: Tensor) -> bool:
    return codes.dtype == torch.float8_e4m3fn and multiplies_float8(x_MK, codes)


def float8_by_float8(x_MK: Rows, codes: Tensor, scales_N: Tensor, bias_N: Tensor | None) -> Tensor:
    """In float8, x's rows too."""
    small = rounded(x_MK, torch.float8_e4m3fn)
    out: Tensor = torch._scaled_mm(
        small.codes_MK,
        codes.t(),
        scale_a=small.scales_M.unsqueeze(1),
        scale_b=scales_N.unsqueeze(0),
        out_dtype=small.dtype,
    )
    return out if bias_N is None else out + bias_N
