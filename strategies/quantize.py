"""Weights in fewer bits: which of a rank's layers, in groups of how many, and what cannot be.

A rank's small weights are a slice of the model's: they do not depend on the layout, so that every layout answers as one
process does. int8 and fp8 scale a whole output channel, also where a rank has some of its columns; int4's groups never
straddle two ranks, so columns are split by whole groups. orchestrator/engine/quantized.py has the arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.errors import BadLayout
from strategies.formats import FORMATS, PLAIN, Format, Width
from strategies.plan import Shard
from strategies.published import Stored
from strategies.scheme import GGUF, SPARSE24, W8A8, Scheme
from strategies.spec import ModelSpec

MADE_AT_LOAD = frozenset({"int8", W8A8, "int4", "fp8", SPARSE24})
RUNS = MADE_AT_LOAD | {GGUF}
"""What weights are kept in, by this version's engine."""

GROUPS = (128, 64, 32)
_FOUR, _SPARSE_COLUMNS = 4, 64  # that are pruned together; that torch's kernels of 2:4 want at a time
_GGUF_GROUP = 32  # columns that ranks have together: a group, or two
LINEARS = ("attention.qkv", "attention.o", "mlp.gate_up", "mlp.down")
"""Of a layer; embedding, head and norms stay in the model's dtype, as the cost model has them."""


def scheme(spec: ModelSpec, kept: Format, name: str) -> Scheme | None:
    """Of the parameter `name` of a rank's transformer, made at load; None: it stays as it is."""
    linear = name.removesuffix(".weight").split(".", 2)
    if kept.weights not in MADE_AT_LOAD or not name.endswith(".weight") or linear[-1] not in LINEARS:
        return None
    if kept.weights == SPARSE24:
        return Scheme(SPARSE24, _FOUR)
    return Scheme(kept.weights, _group(spec, linear[-1]) if kept.weights == "int4" else 0)


def mlp_unit(spec: ModelSpec, kept: Format) -> int:
    """The columns of gate and up that a rank has are a multiple of it."""
    if kept.weights in (GGUF, SPARSE24):
        unit = _GGUF_GROUP if kept.weights == GGUF else _SPARSE_COLUMNS
        return unit if spec.intermediate % unit == 0 else 1
    return _group(spec, "mlp.down") if _has_groups(spec, kept) else 1


def check(spec: ModelSpec, kept: Format, shards: Sequence[Shard]) -> None:
    """Raises BadLayout where groups do not divide what a rank has."""
    if kept.weights == GGUF and spec.latent is None:
        _check_columns(spec, kept, shards, _GGUF_GROUP)
    if kept.weights == SPARSE24 and spec.latent is None:
        _check_columns(spec, kept, shards, _FOUR)
        if spec.hidden % _FOUR or any(len(shard.mlp) % _FOUR or shard.mlp.start % _FOUR for shard in shards):
            raise BadLayout(
                f"+{SPARSE24} prunes two of {_FOUR} columns; {spec.name} has {spec.hidden} hidden and "
                f"{spec.intermediate} MLP columns, which it does not divide among {shards[0].tp}; use +int8"
            )
    if not _has_groups(spec, kept):
        return
    group = _group(spec, "attention.o")
    for linear in LINEARS:
        _group(spec, linear)
    _check_columns(spec, kept, shards, group)


def _check_columns(spec: ModelSpec, kept: Format, shards: Sequence[Shard], group: int) -> None:
    for shard in shards:
        first, size = shard.heads.start * spec.head_dim, len(shard.heads) * spec.head_dim
        if first % group or size % group:
            raise BadLayout(
                f"+{kept.weights} of {spec.name} at tp={shard.tp}: rank {shard.tp_rank} has columns {first} to "
                f"{first + size} of the attention's output, and groups are {group}; use tp{spec.kv_heads} or less, "
                "or +int8"
            )


def _has_groups(spec: ModelSpec, kept: Format) -> bool:
    """Mixtures of experts and latent attention are planned only, by their bytes."""
    return kept.weights == "int4" and spec.experts is None and spec.latent is None


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


def or_native(spec: ModelSpec, kept: Format) -> Format:
    """The native format for one that says nothing of weights."""
    if kept.weights:
        return kept
    return native(spec).with_float8_kv() if kept.has_float8_kv else native(spec)


def can_remake(spec: ModelSpec) -> bool:
    """Whether other formats may be made of what the checkpoint stores, as they are of weights in full."""
    return spec.published is None or spec.published.stored is Stored.GGUF


def kept_on(kind: str, spec: ModelSpec) -> ModelSpec:
    """What devices of a kind keep by themselves. CPUs do not multiply float8: it is widened there. A GGUF file's blocks
    are widened once unless +gguf is named: a CPU is faster so, and so are an H100's prompts and batches of tens."""
    stored, on_cpu = spec.published, kind == "cpu"
    if stored is None or not (stored.format == GGUF or (on_cpu and stored.format == "fp8")):
        return spec
    kept_bytes = stored.kept_bytes_on_cpu if on_cpu else stored.kept_bytes
    return replace(spec, published=replace(stored, format="", kept_bytes=kept_bytes))


def as_kept(spec: ModelSpec, kept: Format, kind: str = "cuda") -> Format:
    """With the bytes that the model's weights take in it on devices of a kind. Raises BadLayout."""
    if kept.weights == SPARSE24 and kind == "cpu":
        return replace(kept, weight_bytes=None)
    if kept.weights != GGUF:
        return kept
    stored = spec.published
    if stored is None or stored.stored is not Stored.GGUF:
        raise BadLayout(
            f"+{GGUF} keeps the blocks of a GGUF file, and {spec.name} has none; use +int8 or +int4"
        )
    width = Width.FOUR if stored.kept_bytes < 1 else Width.EIGHT
    return replace(kept, weight_bytes=stored.kept_bytes, width=width)


def one_group(spec: ModelSpec, asked: int | None = None) -> int:
    """For all linear layers of a checkpoint alike: the largest that divides, or the one asked for. Raises BadLayout."""
    largest = min(_group(spec, linear) for linear in LINEARS)
    if asked is not None and largest % asked:
        raise BadLayout(f"groups of {asked} columns do not divide {spec.name}'s layers; {largest} do")
    return asked or largest
