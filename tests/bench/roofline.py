"""What share of an H100's limits a measurement reached. Bytes and FLOPs are the least that the work takes."""

from __future__ import annotations

from strategies.cost import mean_window
from strategies.spec import BYTES_PER_ELEMENT, ModelSpec

HBM_BYTES_PER_S = {"measured": 3.10e12, "data sheet": 3.35e12}
"""Of an H100 80GB SXM: what a plain read reached (2026-11-21), and what NVIDIA says."""
FLOPS_PER_S = 787e12
"""Dense bfloat16 matrix products on the same card, measured on the same day."""


def decode_bytes(spec: ModelSpec, dtype: str, context: float) -> float:
    """What a decode step of one sequence reads: layers and head, and the KV of its context."""
    weights = (spec.layers * spec.layer_params + spec.embedding_params) * BYTES_PER_ELEMENT[dtype]
    return weights + spec.kv_bytes_per_token(dtype) * mean_window(spec, range(spec.layers), context)


def prefill_flops(spec: ModelSpec, prompt_tokens: int) -> float:
    """Of one prompt: products of the layers, attention, in which a token sees half of it, logits of the last token."""
    seen = mean_window(spec, range(spec.layers), prompt_tokens / 2)
    attention = 4 * spec.layers * spec.heads * spec.head_dim * seen
    return prompt_tokens * (2 * spec.layers * spec.layer_params + attention) + 2 * spec.embedding_params


def memory_line(what: str, n_bytes: float, seconds: float) -> str:
    """`n_bytes` that each GPU read in that time."""
    rate = n_bytes / seconds
    shares = (f"{rate / peak:.0%} of {peak / 1e12:.2f} {how}" for how, peak in HBM_BYTES_PER_S.items())
    return (
        f"{what}: {n_bytes / 1e9:.2f} GB a GPU in {seconds * 1e3:.2f} ms, {rate / 1e12:.2f} TB/s: "
        + ", ".join(shares)
    )


def compute_line(what: str, flops: float, seconds: float) -> str:
    """`flops` that each GPU did in that time."""
    rate = flops / seconds
    return (
        f"{what}: {flops / 1e12:.1f} TFLOP a GPU in {seconds * 1e3:.1f} ms, {rate / 1e12:.0f} TFLOP/s: "
        f"{rate / FLOPS_PER_S:.0%} of {FLOPS_PER_S / 1e12:.0f} measured"
    )
