"""2:4 sparsity: of four columns beside each other the two of largest magnitude stay, the others are 0.

On a GPU torch's semi-structured kernels keep and read half of the weights; elsewhere, and where these kernels do not
take a shape, the zeros are kept. Nothing is trained anew: what it costs is for `shardwise quality` to tell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from cluster.errors import BadLayout
from orchestrator.engine import ops
from strategies.scheme import Scheme

ROWS_UNIT, COLUMNS_UNIT = 32, 64  # of a weight in half precision, by CUTLASS's kernels
_KERNELS = (SparseSemiStructuredTensorCUTLASS, SparseSemiStructuredTensorCUSPARSELT)


def pruned(weight_NK: Tensor) -> Tensor:
    """Two of four columns; of equals the first."""
    fours = weight_NK.reshape(len(weight_NK), -1, 4)
    kept = fours.abs().sort(dim=2, descending=True, stable=True).indices[:, :, :2]
    return torch.zeros_like(fours).scatter_(2, kept, fours.gather(2, kept)).view_as(weight_NK)


class Sparse24(nn.Module):
    """Stands in for a linear layer. A loader fills it by rows, this rank's columns, and calls `finish`."""

    def __init__(
        self, shape: tuple[int, int], how: Scheme, bias: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        n, k = shape
        self.out_features, self.in_features, self.how, self.device = n, k, how, device

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.weight: nn.Parameter | None = made(n, k)
        self.bias = made(n) if bias else None
        self._half: SparseSemiStructuredTensor | None = None

    @property
    def row_bytes(self) -> int:
        assert self.weight is not None
        return int(self.weight.nbytes // self.out_features)

    def fill(self, start: int, rows_NK: Tensor, cols: range | None) -> None:
        """Channels from `start` on, of which a checkpoint's reader gave the columns `cols` alone."""
        assert self.weight is not None
        own_NK = rows_NK if cols is None else rows_NK[:, cols.start : cols.stop]
        own_NK = own_NK.to(self.weight.device, torch.float32)
        self.weight.data[start : start + len(own_NK)] = pruned(own_NK).to(self.weight.dtype)

    def finish(self) -> None:
        """All rows are there: a GPU keeps half of them. Raises BadLayout where torch's kernels refuse."""
        weight = self.weight
        assert weight is not None
        fits = self.out_features % ROWS_UNIT == 0 and self.in_features % COLUMNS_UNIT == 0
        if not weight.is_cuda or weight.dtype not in (torch.bfloat16, torch.float16) or not fits:
            return
        self._half = halved(weight.data)
        self.weight = None
        # What it is made of, as parameters: they are counted, and move with the model.
        for name in ("packed", "meta"):
            part = getattr(self._half, name)
            if part is not None:
                self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    def forward(self, x_MK: Tensor) -> Tensor:
        if self._half is None:
            assert self.weight is not None
            return F.linear(x_MK, self.weight, self.bias)
        product_MN = F.linear(x_MK, self._half).contiguous()
        return product_MN if self.bias is None else product_MN + self.bias


class Sparse24GateUp(Sparse24):
    """With silu(gate) · up behind the product."""

    def forward(self, x_MK: Tensor) -> Tensor:
        return ops.gated(super().forward(x_MK))


def halved(weight_NK: Tensor) -> SparseSemiStructuredTensor:
    """By the first of torch's kernels that multiplies by it on this GPU."""
    reasons = []
    for kernels in _KERNELS:
        try:
            made: SparseSemiStructuredTensor = kernels.from_dense(weight_NK)
            F.linear(
                torch.zeros((8, weight_NK.shape[1]), dtype=weight_NK.dtype, device=weight_NK.device), made
            )
            return made
        except (RuntimeError, NotImplementedError) as error:
            reasons.append(str(error).splitlines()[0][:120])
    raise BadLayout(f"+sparse24: torch's kernels refuse on this GPU ({'; '.join(reasons)}); leave it away")
