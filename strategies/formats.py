"""In what weights, products and KV cache are kept: bytes with their scales, and the rate that products run at.

A format's name is what stands after `+` in a layout's name. Plain is the model's own dtype and has no name. `kvfp8`
behind a format (`+int4+kvfp8`), or alone, keeps the KV cache in float8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

from cluster.errors import BadLayout
from strategies.scheme import GGUF, SPARSE24, W8A8
from strategies.spec import BYTES_PER_ELEMENT


class Width(IntEnum):
    """Bits of a weight, by which kernels' efficiencies are known."""

    FULL = 16
    EIGHT = 8
    FOUR = 4


@dataclass(frozen=True, slots=True)
class Format:
    """How linear layers are kept. Embedding, head, norms and router stay in the model's dtype."""

    weights: str = ""  # its name, without the cache's
    weight_bytes: float | None = None  # of one weight; None: the dtype's
    width: Width = Width.FULL
    compute: str | None = None  # what products run in on devices that can; None, or elsewhere: the dtype
    scales: float = 0.0  # numbers of the dtype beside each weight
    kv_bytes: float | None = None  # of one element of the cache; None: the dtype's
    experts_only: bool = (
        False  # in a mixture of experts attention stays in the dtype, as published checkpoints have it
    )

    def bytes_per_weight(self, dtype: str) -> float:
        """With its scales."""
        size = BYTES_PER_ELEMENT[dtype]
        return size if self.weight_bytes is None else self.weight_bytes + self.scales * size

    @property
    def name(self) -> str:
        return "+".join(part for part in (self.weights, KV_FLOAT8 if self.has_float8_kv else "") if part)

    @property
    def has_float8_kv(self) -> bool:
        return self.kv_bytes is not None

    def with_float8_kv(self) -> Format:
        return replace(self, kv_bytes=1.0)

    def bytes_per_kv(self, dtype: str) -> float:
        return BYTES_PER_ELEMENT[dtype] if self.kv_bytes is None else self.kv_bytes

    @property
    def suffix(self) -> str:
        return f"+{self.name}" if self.name else ""


KV_FLOAT8 = "kvfp8"
PLAIN = Format()

# int8 keeps weights alone; int8w8a8 has activations in int8 too, as most published INT8 models are served.
# Scales: fp8 and int8 one float a block of 128 × 128 or a channel (nothing to speak of); int4 a scale and a zero
# point each 128 weights (quantized.py); fp4 a byte each 16 (NVFP4). int4 is kept in 4 bits and multiplied in the dtype.
# sparse24: two of four in half precision, and four bits that tell which; CPUs keep the zeros, see `as_kept`.
# gguf stands for what a file has, by which quantize.py's `as_kept` replaces it.
_WEIGHTS = (
    Format("fp8", 1.0, Width.EIGHT, "float8"),
    Format("int8", 1.0, Width.EIGHT),
    Format(W8A8, 1.0, Width.EIGHT, "int8"),
    Format("int4", 0.5, Width.FOUR, scales=2 / 128),
    Format("fp4", 0.5 + 1 / 16, Width.FOUR, "float4", experts_only=True),
    Format(GGUF, 0.75, Width.FOUR),
    Format(SPARSE24, 2.0 * 9 / 16),
)
FORMATS = {kept.name: kept for weights in (PLAIN, *_WEIGHTS) for kept in (weights, weights.with_float8_kv())}


def format_named(name: str, layout: str) -> Format:
    """Raises BadLayout, which names `layout`."""
    if name in FORMATS and name:
        return FORMATS[name]
    known = ", ".join(f"+{known}" for known in (KV_FLOAT8, *(kept.weights for kept in _WEIGHTS)))
    raise BadLayout(
        f"layout {layout!r}: +{name} is not a format; formats are {known}, and +offload comes last"
    )
