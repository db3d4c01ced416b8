"""The decoder-only transformer, written once, with no word about parallelism.

A rank runs a smaller one (strategies/tensor.py) or fewer layers of it (strategies/pipeline.py), and the sums between
ranks are hooked on from outside.

Dimensions, as suffixes of tensors: T tokens of all sequences in the batch, one after another; H query heads,
K KV heads, D head dimension, E hidden size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orchestrator.engine.rope import Rope
from strategies.spec import ModelSpec


class AttentionContext(Protocol):
    """What attention needs to know of a batch: where KV is written, and what each query sees."""

    positions_T: Tensor  # int64

    def attend(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Write K and V of this batch to the layer's cache, then attend over it: → [T, H, D]."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        if x.is_cuda:
            normed = F.rms_norm(wide, self.weight.shape, None, self.eps)
        else:  # where torch takes rms_norm apart into twenty calls, 83 µs for one token; mean is five of them
            mean_square = wide.square().sum(dim=-1, keepdim=True) * (1 / wide.shape[-1])
            normed = wide * torch.rsqrt(mean_square + self.eps)
        # In half precision the weight multiplies after rounding, as the reference implementations do.
        return normed.to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        rows = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        self.qkv = nn.Linear(spec.hidden, rows, bias=spec.qkv_bias)
        self.o = nn.Linear(spec.heads * spec.head_dim, spec.hidden, bias=spec.o_bias)
        self.q_norm = RMSNorm(spec.head_dim, spec.rms_eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.rms_eps) if spec.qk_norm else None

    def forward(
        self, x_TE: Tensor, layer: int, rotation: tuple[Tensor, Tensor], context: AttentionContext
    ) -> Tensor:
        heads, kv_heads = self.heads, self.kv_heads
        qkv_THD = self.qkv(x_TE).view(len(x_TE), -1, self.head_dim)
        qk_THD, v_TKD = torch.split(qkv_THD, [heads + kv_heads, kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            qk_THD = torch.cat((self.q_norm(qk_THD[:, :heads]), self.k_norm(qk_THD[:, heads:])), dim=1)
        q_THD, k_TKD = torch.split(rotate(qk_THD, *rotation), [heads, kv_heads], dim=1)
        out: Tensor = self.o(context.attend(layer, q_THD, k_TKD, v_TKD).flatten(1))
        return out


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_up = nn.Linear(spec.hidden, 2 * spec.intermediate, bias=spec.mlp_bias)
        self.down = nn.Linear(spec.intermediate, spec.hidden, bias=spec.mlp_bias)

    def forward(self, x_TE: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TE).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_norm = RMSNorm(spec.hidden, spec.rms_eps)
        self.attention = Attention(spec)
        self.post_norm = RMSNorm(spec.hidden, spec.rms_eps)
        self.mlp = MLP(spec)

    def forward(
        self, x_TE: Tensor, layer: int, rotation: tuple[Tensor, Tensor], context: AttentionContext
    ) -> Tensor:
        x_TE = x_TE + self.attention(self.input_norm(x_TE), layer, rotation, context)
        out: Tensor = x_TE + self.mlp(self.post_norm(x_TE))
        return out


class Transformer(nn.Module):
    """`spec.layers` layers, with the embedding before them and the norm and head behind them where asked for."""

    def __init__(self, spec: ModelSpec, *, embed: bool = True, head: bool = True) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Embedding(spec.vocab, spec.hidden) if embed else None
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.norm = RMSNorm(spec.hidden, spec.rms_eps) if head else None
        self.head = nn.Linear(spec.hidden, spec.vocab, bias=False) if head else None
        self.rope = Rope(spec.rope, spec.head_dim, spec.max_positions)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Token ids [T], or the previous stage's hidden states [T, E] → hidden states [T, E], before the final norm."""
        hidden_TE = x if self.embed is None else self.embed(x)
        rotation = self.rope(context.positions_T, hidden_TE.dtype)
        for index, layer in enumerate(self.layers):
            hidden_TE = layer(hidden_TE, index, rotation, context)
        return hidden_TE

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Final norm and head, in float32: [T, vocabulary]."""
        assert self.norm is not None and self.head is not None, "only the last stage has a head"
        out: Tensor = self.head(self.norm(hidden_TE)).float()
        return out


def rotate(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    """Rotary embedding over halves of the head dimension, as the Hugging Face checkpoints are laid out."""
    first, second = x_THD.chunk(2, dim=-1)
    return x_THD * cos_T1D + torch.cat((-second, first), dim=-1) * sin_T1D
