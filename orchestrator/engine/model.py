"""The decoder-only transformer, written once, with no word about parallelism and none about devices.

A rank runs a smaller one (strategies/tensor.py) or fewer layers of it (strategies/pipeline.py), and the sums between
ranks are hooked on from outside. What is worth a kernel of its own is a function of ops.py, or is done by the
attention context, which knows the batch and the cache.

Dimensions, as suffixes of tensors: T tokens of all sequences in the batch, one after another; H query heads,
K KV heads, D head dimension, E hidden size, N rows of the QKV product: (H + 2 K) × D.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from orchestrator.engine import ops
from orchestrator.engine.rope import Rope
from orchestrator.engine.small_rows import RoundsTo, Rows, never
from strategies.spec import ModelSpec


class AttentionContext(Protocol):
    """What attention needs to know of a batch: each token's position, where its KV goes, and what it sees."""

    def attend(self, layer: int, qkv_TN: Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None) -> Tensor:
        """Norm and rotate q and k, write k and v to the layer's cache, attend over it: → [T, H × D].

        `qkv_TN` may be written over.
        """


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    next_rounds_to: RoundsTo = staticmethod(never)  # of the layer that the norm is for

    def forward(self, x_TE: Tensor, residual_TE: Tensor | None = None) -> tuple[Rows, Tensor]:
        """→ the norm of x + residual, and x + residual. Both arguments may be written over."""
        small = self.next_rounds_to(x_TE)
        return ops.add_rms_norm(x_TE, residual_TE, self.weight, self.eps, small)


class Unfilled:
    """A layer whose weights always come from a checkpoint.

    What torch would fill them with on the meta device takes imports of 900 modules: seconds of a start.
    """

    def reset_parameters(self) -> None:
        pass


class Linear(Unfilled, nn.Linear):
    ways: ops.Ways = ()  # chosen by measurement, where there is a choice

    def forward(self, x_TE: Tensor) -> Tensor:
        return ops.linear(x_TE, self.weight, self.bias, self.ways)


class GateUp(Unfilled, nn.Linear):
    """Both halves of a gated MLP's first product, and what joins them: silu(gate) · up."""

    ways: ops.Ways = ()

    def forward(self, x_TE: Tensor) -> Tensor:
        return ops.gate_up(x_TE, self.weight, self.bias, self.ways)


class Embedding(Unfilled, nn.Embedding):
    pass


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.qkv = Linear(spec.hidden, rows, bias=spec.qkv_bias)
        self.o = Linear(spec.heads * spec.head_dim, spec.hidden, bias=spec.o_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.rms_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.rms_eps) if spec.qk_norm else None

    def forward(self, x_TE: Rows, layer: int, context: AttentionContext, wanted_R: Tensor | None) -> Tensor:
        heads_TN = context.attend(layer, self.qkv(x_TE), self.q_norm, self.k_norm)
        out: Tensor = self.o(heads_TN if wanted_R is None else heads_TN[wanted_R])
        return out


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_up = GateUp(spec.hidden, 2 * spec.intermediate, bias=spec.mlp_bias)
        self.down = Linear(spec.intermediate, spec.hidden, bias=spec.mlp_bias)

    def forward(self, x_TE: Rows) -> Tensor:
        out: Tensor = self.down(self.gate_up(x_TE))
        return out


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_norm = RMSNorm(spec.hidden, spec.rms_eps)
        self.attention = Attention(spec)
        self.post_norm = RMSNorm(spec.hidden, spec.rms_eps)
        self.mlp = MLP(spec)

    def forward(
        self,
        x_TE: Tensor,
        residual_TE: Tensor | None,
        layer: int,
        context: AttentionContext,
        wanted_R: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """→ the MLP's output and the sum that it is to be added to: the next norm adds them.

        Of the tokens `wanted_R` alone where it is given: nothing that comes later needs the others.
        """
        x_TE, residual_TE = self.input_norm(x_TE, residual_TE)
        x_TE = self.attention(x_TE, layer, context, wanted_R)
        if wanted_R is not None:
            residual_TE = residual_TE[wanted_R]
        x_TE, residual_TE = self.post_norm(x_TE, residual_TE)
        return self.mlp(x_TE), residual_TE


class Transformer(nn.Module):
    """`spec.layers` layers, with the embedding before them and the norm and head behind them where asked for."""

    def __init__(self, spec: ModelSpec, *, embed: bool = True, head: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.embed = Embedding(spec.vocab, spec.hidden) if embed else None
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = RMSNorm(spec.hidden, spec.rms_eps) if head else None
        self.head = Linear(spec.hidden, spec.vocab, bias=False) if head else None
        self.rope = Rope(spec.rope, spec.head_dim, spec.max_positions)

    def forward(self, x: Tensor, context: AttentionContext, wanted_R: Tensor | None = None) -> Tensor:
        """Token ids [T], or the previous stage's hidden states [T, E] → hidden states [T, E], before the final norm.

        Those of the tokens `wanted_R` alone where it is given, which spares the last layer most of a prompt's work.
        """
        x_TE = x if self.embed is None else self.embed(x)
        residual_TE = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            wanted = wanted_R if index == last else None
            x_TE, residual_TE = layer(x_TE, residual_TE, index, context, wanted)
        return x_TE if residual_TE is None else x_TE + residual_TE

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Final norm and head, in the model's dtype: [T, rows of the head]."""
        assert self.norm is not None and self.head is not None, "only the last stage has a head"
        out: Tensor = self.head(self.norm(hidden_TE)[0])
        return out
