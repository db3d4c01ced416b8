"""How one linear layer is kept."""

from __future__ import annotations

from dataclasses import dataclass

GGUF = "gguf"  # formats' names: codes as a GGUF file has them
W8A8 = "int8w8a8"  # int8 weights and activations
SPARSE24 = "sparse24"  # two of four columns


@dataclass(frozen=True, slots=True)
class Scheme:
    """`group`: columns that share a scale, and a zero point or a least value; 0: a scale a channel.

    Of groups alone: bits of a code; `least`: whether code 0 stands for a value of its own, not for 0; `half`: scales in
    float16 hold what is stored.
    """

    format: str
    group: int = 0
    bits: int = 4
    least: bool = True
    half: bool = False

    @property
    def numbers(self) -> int:
        """Kept of each group: kernels of 4 bits read pairs."""
        return 2 if self.least or self.bits == 4 else 1

    @property
    def bytes_per_weight(self) -> float:
        """Of codes in groups as a GGUF file has them."""
        return self.bits / 8 + self.numbers * (2 if self.half else 4) / self.group
