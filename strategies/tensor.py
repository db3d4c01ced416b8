"""Tensor parallelism: each rank is the same transformer with fewer heads, a narrower MLP and fewer vocabulary rows,
plus two sums a layer, one for the embedding, and logits of its own vocabulary rows, which `Vocabulary` puts together.

Attention is split by whole KV groups, evenly or not; MLP columns and vocabulary rows likewise. Beyond the KV heads
each KV head is replicated over several ranks, which share its query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import BadLayout
from strategies.plan import Shard
from strategies.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cluster.collectives import StageGroup


def split_evenly(total: int, parts: int) -> list[range]:
    """Contiguous ranges over `total`, the first `total % parts` one longer."""
    size, extra = divmod(total, parts)
    bounds = [i * size + min(i, extra) for i in range(parts + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def split_in_units(total: int, parts: int, unit: int) -> list[range]:
    """The same in whole units; `unit` divides the total."""
    return [range(r.start * unit, r.stop * unit) for r in split_evenly(total // unit, parts)]


def split_heads(spec: ModelSpec, tp: int) -> list[tuple[range, range]]:
    """Each rank's (query heads, KV heads). Raises BadLayout where tp exceeds the query heads."""
    if tp > spec.heads:
        raise BadLayout(
            f"tp={tp} exceeds the {spec.heads} attention heads of {spec.name}; use tp{spec.heads} or less"
        )
    if tp <= spec.kv_heads:
        groups = split_evenly(spec.kv_heads, tp)
        return [(range(g.start * spec.group, g.stop * spec.group), g) for g in groups]
    parts = []
    for kv_head, sharers in enumerate(split_evenly(tp, spec.kv_heads)):
        first = kv_head * spec.group
        if len(sharers) > spec.group:
            raise BadLayout(
                f"tp={tp} puts {len(sharers)} ranks on KV head {kv_head} of {spec.name}, which has "
                f"{spec.group} query heads"
            )
        parts += [
            (range(first + part.start, first + part.stop), range(kv_head, kv_head + 1))
            for part in split_evenly(spec.group, len(sharers))
        ]
    return parts


def shard_stage(
    spec: ModelSpec, tp: int, stage: int, pp: int, layers: range, mlp_unit: int = 1
) -> list[Shard]:
    """The shards of one pipeline stage, by tp rank. `mlp_unit`: MLP columns that stay together."""
    heads = split_heads(spec, tp)
    mlp = split_in_units(spec.intermediate, tp, mlp_unit)
    vocab = split_evenly(spec.vocab, tp)
    return [Shard(t, tp, stage, pp, layers, heads[t][0], heads[t][1], mlp[t], vocab[t]) for t in range(tp)]


def local_spec(spec: ModelSpec, shard: Shard) -> ModelSpec:
    """The smaller transformer that a rank runs."""
    return replace(
        spec,
        layers=len(shard.layers),
        heads=len(shard.heads),
        kv_heads=len(shard.kv_heads),
        intermediate=len(shard.mlp),
        vocab=len(shard.vocab),
        windows=tuple(spec.windows[i] for i in shard.layers) if spec.windows else (),
    )


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one checkpoint tensor, by its Hugging Face name; None is all of that dimension."""

    name: str
    rows: range | None = None
    cols: range | None = None


def pieces(spec: ModelSpec, shard: Shard) -> dict[str, tuple[Piece, ...]]:
    """For each parameter of a rank's transformer, the checkpoint pieces that are its rows, in order.

    No pieces: zeros (the bias of a summed product, which only the first rank adds).
    """
    found: dict[str, tuple[Piece, ...]] = {}
    if shard.is_first or (shard.is_last and spec.tied):
        table = Piece("model.embed_tokens.weight", rows=shard.vocab)
        if shard.is_first:
            found["embed.weight"] = (table,)
        if shard.is_last and spec.tied and not shard.is_first:
            found["head.weight"] = (table,)
    for local, layer in enumerate(shard.layers):
        found |= _layer_pieces(spec, shard, f"layers.{local}", f"model.layers.{layer}")
    if shard.is_last:
        found["norm.weight"] = (Piece("model.norm.weight"),)
        if not spec.tied:
            found["head.weight"] = (Piece("lm_head.weight", rows=shard.vocab),)
    return found


def _layer_pieces(spec: ModelSpec, shard: Shard, to: str, source: str) -> dict[str, tuple[Piece, ...]]:
    q = _scaled(shard.heads, spec.head_dim)
    kv = _scaled(shard.kv_heads, spec.head_dim)
    attention, mlp = f"{source}.self_attn", f"{source}.mlp"
    qkv = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
    gate_up = (("gate_proj", shard.mlp), ("up_proj", shard.mlp))
    found = {
        f"{to}.input_norm.weight": (Piece(f"{source}.input_layernorm.weight"),),
        f"{to}.post_norm.weight": (Piece(f"{source}.post_attention_layernorm.weight"),),
        f"{to}.attention.qkv.weight": tuple(Piece(f"{attention}.{p}.weight", rows=r) for p, r in qkv),
        f"{to}.attention.o.weight": (Piece(f"{attention}.o_proj.weight", cols=q),),
        f"{to}.mlp.gate_up.weight": tuple(Piece(f"{mlp}.{p}.weight", rows=r) for p, r in gate_up),
        f"{to}.mlp.down.weight": (Piece(f"{mlp}.down_proj.weight", cols=shard.mlp),),
    }
    if spec.qkv_bias:
        found[f"{to}.attention.qkv.bias"] = tuple(Piece(f"{attention}.{p}.bias", rows=r) for p, r in qkv)
    if spec.qk_norm:
        found[f"{to}.attention.q_norm.weight"] = (Piece(f"{attention}.q_norm.weight"),)
        found[f"{to}.attention.k_norm.weight"] = (Piece(f"{attention}.k_norm.weight"),)
    first = shard.tp_rank == 0
    if spec.o_bias:
        found[f"{to}.attention.o.bias"] = (Piece(f"{attention}.o_proj.bias"),) if first else ()
    if spec.mlp_bias:
        found[f"{to}.mlp.gate_up.bias"] = tuple(Piece(f"{mlp}.{p}.bias", rows=r) for p, r in gate_up)
        found[f"{to}.mlp.down.bias"] = (Piece(f"{mlp}.down_proj.bias"),) if first else ()
    return found


def _scaled(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)


class Sums(Protocol):
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the stage's ranks, in place and returned."""


def apply(model: nn.Module, spec: ModelSpec, shard: Shard, group: Sums) -> None:
    """Turn a rank's transformer, built from `local_spec`, into its part of the whole. The model does not know."""
    if shard.tp == 1:
        return
    parts: Any = model

    def reduce(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        return group.all_reduce(out)

    for layer in parts.layers:
        layer.attention.o.register_forward_hook(reduce)
        layer.mlp.down.register_forward_hook(reduce)
    if parts.embed is not None:
        _split_embedding(parts.embed, shard.vocab, group)


class Vocabulary:
    """What the columns of logits that one rank computes mean: all tokens' logits, and the likeliest of all tokens."""

    def __init__(self, spec: ModelSpec, shard: Shard, group: StageGroup) -> None:
        self._widths = [len(r) for r in split_evenly(spec.vocab, shard.tp)]
        self._rank, self._first, self._group = shard.tp_rank, shard.vocab.start, group

    def whole(self, own_RV: Tensor) -> Tensor:
        """[rows, vocabulary], of every rank's columns."""
        return own_RV if len(self._widths) == 1 else self._group.all_gather_columns(own_RV, self._widths)

    def likeliest(self, own_RV: Tensor, argmax: Callable[[Tensor], Tensor]) -> Tensor:
        """The best column of each row, by `argmax` the first of equals: [rows]. Only each rank's best one travels."""
        own_R = argmax(own_RV)
        if len(self._widths) == 1:
            return own_R
        best_RP2 = own_RV.float().new_zeros(
            (len(own_RV), len(self._widths), 2)
        )  # value, token id (exact to 2²⁴)
        best_RP2[:, self._rank, 0] = own_RV.gather(1, own_R.unsqueeze(1)).squeeze(1)
        best_RP2[:, self._rank, 1] = own_R + self._first
        best_RP2 = self._group.all_reduce(best_RP2)  # of zeros but for one: a gather
        winner_R = argmax(best_RP2[:, :, 0].contiguous())
        return best_RP2[:, :, 1].gather(1, winner_R.unsqueeze(1)).squeeze(1).long()


def _split_embedding(embed: nn.Module, rows: range, group: Sums) -> None:
    """Ids of other ranks' rows look up row 0 here and count as zero; the sum puts the rows together."""
    absent: list[Tensor] = []

    def localise(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        local = args[0] - rows.start
        outside = (local < 0) | (local >= len(rows))
        absent.append(outside)
        return (local.masked_fill(outside, 0),)

    def assemble(_module: nn.Module, _args: object, out: Tensor) -> Tensor:
        return group.all_reduce(out.masked_fill(absent.pop().unsqueeze(-1), 0))

    embed.register_forward_pre_hook(localise)
    embed.register_forward_hook(assemble)
