"""Which of a GGUF file's quantizations stay codes in memory, and how layers are kept that are made up of several.

4 bits and groups of 32 hold Q4_0, Q4_1 and Q4_K, 8 bits the others, and all of them on a CPU, where taking bytes apart
takes five times as long (10.5 ns a weight against 2.2, Xeon, 2026-11-22). A K-quant's scale of a block times those of
its groups is exact in float32, so nothing is rounded anew. orchestrator/engine/gguf_blocks.py takes the blocks apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from strategies.gguf_header import GgufTensor
from strategies.published import Published, Stored
from strategies.scheme import GGUF, Scheme

KEPT = {
    "Q4_0": Scheme(GGUF, 32, least=False, half=True),
    "Q4_1": Scheme(GGUF, 32),
    "Q4_K": Scheme(GGUF, 32),
    "Q8_0": Scheme(GGUF, 32, 8, least=False, half=True),
    "Q5_0": Scheme(GGUF, 32, 8, least=False, half=True),
    "Q5_1": Scheme(GGUF, 32, 8),
    "Q5_K": Scheme(GGUF, 32, 8),
    "Q6_K": Scheme(GGUF, 16, 8, least=False),
}
_LINEAR = re.compile(r"(blk\.\d+)\.(attn_q|attn_k|attn_v|attn_output|ffn_gate|ffn_up|ffn_down)\.weight")
_TOGETHER = {"attn_k": "attn_q", "attn_v": "attn_q", "ffn_up": "ffn_gate"}  # rows of one product


def together(kinds: Sequence[str]) -> Scheme | None:
    """Of a layer whose rows are stored in these; None: one of them is in full."""
    if not all(kind in KEPT for kind in kinds):
        return None
    parts = [KEPT[kind] for kind in kinds]
    return Scheme(
        GGUF,
        min(part.group for part in parts),
        max(part.bits for part in parts),
        any(part.least for part in parts),
        all(part.half for part in parts),
    )


def of_tensors(tensors: Mapping[str, GgufTensor]) -> Published | None:
    """What the linear layers of a file are kept in; None: none of them is in codes."""
    products: dict[tuple[str, str], list[GgufTensor]] = {}
    for name, tensor in tensors.items():
        if match := _LINEAR.fullmatch(name):
            layer, part = match.groups()
            products.setdefault((layer, _TOGETHER.get(part, part)), []).append(tensor)
    weights = kept_bytes = on_cpu = 0.0
    found = False
    for parts in products.values():
        how = together([part.format.name for part in parts])
        count = sum(part.shape[0] * part.shape[-1] for part in parts)
        found = found or how is not None
        weights += count
        kept_bytes += count * (2.0 if how is None else how.bytes_per_weight)
        on_cpu += count * (4.0 if how is None else replace(how, bits=8).bytes_per_weight)
    if not found:
        return None
    return Published(
        Stored.GGUF, 0, format=GGUF, kept_bytes=kept_bytes / weights, kept_bytes_on_cpu=on_cpu / weights
    )
