"""Weights in codes, as checkpoints of any kind have them.

Dimensions: N output channels, K columns, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """Of some rows and columns. w = (code − zero point) × scale, or code × scale + least."""

    codes_NK: Tensor  # uint8 with zero points, else int8 or float8
    scales_NG: Tensor  # as stored; G may be 1
    zero_points_NG: Tensor | None  # uint8
    least_NG: Tensor | None = None  # float32

    def dequantized(self) -> Tensor:
        """float32."""
        n, k = self.codes_NK.shape
        groups = self.codes_NK.float().view(n, self.scales_NG.shape[1], -1)
        if self.zero_points_NG is not None:
            groups = groups - self.zero_points_NG.float()[:, :, None]
        wide = groups * self.scales_NG.float()[:, :, None]
        if self.least_NG is not None:
            wide += self.least_NG[:, :, None]
        return wide.view(n, k)

    def rows(self, rows: slice) -> StoredCodes:
        def of(some: Tensor | None) -> Tensor | None:
            return None if some is None else some[rows]

        return StoredCodes(
            self.codes_NK[rows], self.scales_NG[rows], of(self.zero_points_NG), of(self.least_NG)
        )
