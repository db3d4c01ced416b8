"""torch's products by weights of 8 and 4 bits on CPUs, where they are fast: in bfloat16.

In float32 and float16 they are plain loops, 5 to 100 times slower than widening the weights first (Xeon with AMX,
torch 2.13, 2026-11-22), so those go without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

INT8_MOST_ROWS = 32  # more: widening pays (4096 × 4096: 52 ms at 128 rows, widened 26)
_INT4_CHANNELS = 16  # the kernel wants a multiple of it
_BLOCK = 256  # channels packed at once: a multiple of the kernel's own blocks

_aten: Any = torch.ops.aten
_INT8 = hasattr(_aten, "_weight_int8pack_mm")
_INT4 = hasattr(_aten, "_weight_int4pack_mm_for_cpu") and hasattr(
    _aten, "_convert_weight_to_int4pack_for_cpu"
)


def has_int8(rows: int, dtype: torch.dtype) -> bool:
    return _INT8 and dtype == torch.bfloat16 and rows <= INT8_MOST_ROWS


def int8(x_MK: Tensor, codes_NK: Tensor, scales_N: Tensor) -> Tensor:
    product: Tensor = _aten._weight_int8pack_mm(x_MK, codes_NK, scales_N)
    return product


def has_int4(channels: int, dtype: torch.dtype) -> bool:
    return _INT4 and dtype == torch.bfloat16 and channels % _INT4_CHANNELS == 0


def pack_int4(codes: Tensor, unpack: Callable[[Tensor], Tensor]) -> None:
    """In place, some channels at a time, from our order of codes to that of torch's kernel."""
    for start in range(0, len(codes), _BLOCK):
        some = codes[start : start + _BLOCK]
        some.copy_(_aten._convert_weight_to_int4pack_for_cpu(unpack(some).to(torch.int32), 1))


def int4(x_MK: Tensor, packed: Tensor, scales_GN2: Tensor, group: int) -> Tensor:
    product: Tensor = _aten._weight_int4pack_mm_for_cpu(x_MK, packed, group, scales_GN2)
    return product
