"""A CPU's linear layers in full, their weights packed once for oneDNN's products."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from cluster import onednn
from orchestrator.engine import ops
from orchestrator.engine.model import GateUp, Linear


class Packed(nn.Module):
    """In place of a Linear. Its weight is no parameter: nothing but the product can read it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._weight = onednn.packed(linear.weight.data)

    @property
    def weight_bytes(self) -> int:
        return self._weight.nbytes

    def forward(self, x_MK: Tensor) -> Tensor:
        return onednn.product(x_MK, self._weight, self.bias)


class PackedGateUp(Packed):
    """silu(gate) · up, the gate's rows first in the weight."""

    def forward(self, x_MK: Tensor) -> Tensor:
        return ops.gated(super().forward(x_MK))


def pack(model: nn.Module, streamed: Iterable[int]) -> None:
    """Replaces linear layers on the CPU, each weight freed as it is packed: but a tied head's, which the embedding
    reads, and those of layers that are streamed, which come and go as they lie."""
    parts: Any = model
    left = {part for index in streamed for part in parts.layers[index].modules()}
    for owner in [part for part in model.modules() if part not in left and not isinstance(part, nn.Linear)]:
        for name in [name for name, _ in owner.named_children()]:
            linear = getattr(owner, name)
            if isinstance(linear, Linear | GateUp) and onednn.has_packed(linear.weight.dtype):
                setattr(owner, name, (PackedGateUp if isinstance(linear, GateUp) else Packed)(linear))


def packed_bytes(model: nn.Module) -> int:
    return sum(layer.weight_bytes for layer in model.modules() if isinstance(layer, Packed))
