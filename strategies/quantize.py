"""Weights in fewer bits: which of a rank's layers, in groups of how many, and what cannot be.

A rank's small weights are a slice of the model's: they do not depend on the layout, so that every layout answers as one
process does. int8 and fp8 scale a whole output channel, also where a rank has some of its columns; int4's groups never
straddle two ranks, so columns are split by whole groups. orchestrator/engine/quantized.py has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import BadLayout
from strategies.formats import FORMATS, PLAIN, Format
from strategies.plan import Shard
from strategies.spec import ModelSpec

MADE_AT_LOAD = frozenset({"int8", "int4", "fp8"})
GROUPS = (128, 64, 32)
LINEARS = ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")
"""Of a layer; embedding, head and norms stay in the model's dtype, as the cost model has them."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one linear layer is kept. `group`: columns that share a scale and a zero point; 0: a scale a channel."""

    format: str
    group: int = 0


def scheme(spec: ModelSpec, kept: Format, name: str) -> Scheme | None:
    """Of the parameter `name` of a rank's transformer; None: it stays as it is."""
    linear = name.removesuffix(".weight").split(".", 2)
    if kept.name not in MADE_AT_LOAD or not name.endswith(".weight") or linear[-1] not in LINEARS:
        return None
    return Scheme(kept.name, _group(spec, linear[-1]) if kept.name == "int4" else 0)


def mlp_unit(spec: ModelSpec, kept: Format) -> int:
    """The columns of gate and up that a rank has are a multiple of it."""
    return _group(spec, "mlp.down") if _has_groups(spec, kept) else 1


def check(spec: ModelSpec, kept: Format, shards: Sequence[Shard]) -> None:
    """Raises BadLayout where groups do not divide what a rank has."""
    if not _has_groups(spec, kept):
        return
    group = _group(spec, "attention.o")
    for linear in LINEARS:
        _group(spec, linear)
    for shard in shards:
        first, size = shard.heads.start * spec.head_dim, len(shard.heads) * spec.head_dim
        if first % group or size % group:
            raise BadLayout(
                f"+int4 of {spec.name} at tp={shard.tp}: rank {shard.tp_rank} has columns {first} to {first + size} "
                f"of the attention's output, and groups are {group}; use tp{spec.kv_heads} or less, or +int8"
            )


def _has_groups(spec: ModelSpec, kept: Format) -> bool:
    """Mixtures of experts and latent attention are planned only, by their bytes."""
    return kept.name == "int4" and spec.experts is None and spec.latent is None


def _group(spec: ModelSpec, linear: str) -> int:
    """The largest that divides the columns; at the attention's output a KV group's, which ranks have whole."""
    columns, what = {
        "attention.o": (spec.group * spec.head_dim, "columns of a KV group"),
        "mlp.down": (spec.intermediate, "columns of the MLP"),
    }.get(linear, (spec.hidden, "hidden columns"))
    stored = spec.published.group if spec.published is not None else 0
    for group in GROUPS:
        if columns % group == 0 and stored % group == 0:  # a stored group may be told as several
            return group
    raise BadLayout(
        f"+int4 needs groups of {', '.join(map(str, GROUPS))} columns; {spec.name} has {columns} {what}, "
        "which none divides; use +int8"
    )


def native(spec: ModelSpec) -> Format:
    """What layouts have that name no format: what the checkpoint stores, or nothing."""
    return FORMATS[spec.published.format] if spec.published is not None else PLAIN


def one_group(spec: ModelSpec, asked: int | None = None) -> int:
    """For all linear layers of a checkpoint alike: the largest that divides, or the one asked for. Raises BadLayout."""
    largest = min(_group(spec, linear) for linear in LINEARS)
    if asked is not None and largest % asked:
        raise BadLayout(f"groups of {asked} columns do not divide {spec.name}'s layers; {largest} do")
    return asked or largest
