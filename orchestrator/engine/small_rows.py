"""Rows of x in 8 bits, as products of 8 by 8 bits take them.

What writes x rounds its rows on the way, where one layer alone reads them: x is then neither written in full nor read
again. The numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SmallRows:
    """Each row scaled so that its largest is the codes' largest."""

    codes_MK: Tensor  # int8 or float8 (e4m3)
    scales_M: Tensor  # float32
    dtype: torch.dtype  # of x, and of what comes of the product

    def __len__(self) -> int:
        return len(self.codes_MK)

    @property
    def device(self) -> torch.device:
        return self.codes_MK.device

    @property
    def is_cuda(self) -> bool:
        return self.codes_MK.is_cuda


Rows = Tensor | SmallRows

RoundsTo = Callable[[Rows], torch.dtype | None]
"""What a layer multiplies such rows in, of which their number and dtype count; None: as they are."""


def never(_x_MK: Rows) -> None:
    """Of a layer that takes x as it is."""
