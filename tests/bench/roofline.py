"""What share of a GPU's limits a measurement reached. Bytes and FLOPs are the least that the work takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.catalog import find
from strategies.cost import mean_window
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec

MEASURED = {"h100": (3.10e12, 787e12)}
"""Bytes/s of a plain read and FLOP/s of dense bfloat16 products, as such a card took them (2026-11-21)."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates by where they come from: "measured" on such a card, where one was, and the data sheet's."""

    bytes_per_s: Mapping[str, float]
    flops_per_s: Mapping[str, float]


def limits_of(gpu: str) -> Limits:
    """Of a GPU by the driver's name; none for one that the catalogue lacks."""
    found = find(gpu)
    if found is None:
        return Limits({}, {})
    sheet = Limits({"data sheet": found.bandwidth_bytes_per_s}, {"data sheet": found.flops_per_s["bfloat16"]})
    if found.key not in MEASURED:
        return sheet
    bytes_per_s, flops_per_s = MEASURED[found.key]
    return Limits(
        {"measured": bytes_per_s, **sheet.bytes_per_s}, {"measured": flops_per_s, **sheet.flops_per_s}
    )


def decode_bytes(spec: ModelSpec, dtype: str, context: float) -> float:
    """What a decode step of one sequence reads: layers and head, and the KV of its context."""
    weights = (spec.layers * spec.layer_params + spec.embedding_params) * BYTES_PER_ELEMENT[dtype]
    return weights + spec.kv_bytes_per_token(dtype) * mean_window(spec, range(spec.layers), context)


def prefill_flops(spec: ModelSpec, prompt_tokens: int) -> float:
    """Of one prompt: products of the layers, attention, in which a token sees half of it, logits of the last token."""
    seen = mean_window(spec, range(spec.layers), prompt_tokens / 2)
    attention = 4 * spec.layers * spec.heads * spec.head_dim * seen
    return prompt_tokens * (2 * spec.layers * spec.layer_params + attention) + 2 * spec.embedding_params


def memory_line(what: str, n_bytes: float, seconds: float, limits: Limits) -> str:
    """`n_bytes` that each GPU read in that time."""
    rate = n_bytes / seconds
    done = f"{what}: {n_bytes / 1e9:.2f} GB a GPU in {seconds * 1e3:.2f} ms, {rate / 1e12:.2f} TB/s"
    shares = (f"{rate / most:.0%} of {most / 1e12:.2f} {how}" for how, most in limits.bytes_per_s.items())
    return ": ".join([done, *filter(None, [", ".join(shares)])])


def compute_line(what: str, flops: float, seconds: float, limits: Limits) -> str:
    """`flops` that each GPU did in that time."""
    rate = flops / seconds
    done = f"{what}: {flops / 1e12:.1f} TFLOP a GPU in {seconds * 1e3:.1f} ms, {rate / 1e12:.0f} TFLOP/s"
    shares = (f"{rate / most:.0%} of {most / 1e12:.0f} {how}" for how, most in limits.flops_per_s.items())
    return ": ".join([done, *filter(None, [", ".join(shares)])])
