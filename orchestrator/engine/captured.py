"""Which steps are captured as CUDA graphs, which of them a step fits, and what the host tells a graph of its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from orchestrator.engine.slots import Slots
from orchestrator.engine.told import Block, Ints32, Shape, numbers_of, told_of_rows
from orchestrator.step import Row, halves

GRAPH_PROMPTS = 64  # that a captured step has room for, beside its decodes
SHORT_TOKENS = 512
CHUNK_TOKENS = (16, 32, *range(64, SHORT_TOKENS + 1, 64), 640, 768, 896, 1024)
"""Steps of up to so many tokens, prompts' and decodes', are captured too: 512 tokens of Llama-3.1-8B take an H100 some
12 ms, no longer than launching 300 kernels one by one takes the host."""
SHARED_CHUNK_TOKENS = (1280, 1536, 1792, 2048)
"""Also where a layer's work is shared by ranks, who launch as many kernels for less of it, and sums besides. There the
largest step is captured too, which most steps of a crowd of prompts are."""
LEAST_FILLED = 0.75  # of a captured step's tokens, beyond the short ones


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Rows of the decode steps that are captured; a step is padded to the next of them, by an eighth from 64 on."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs + 1, 16)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def chunk_sizes(step_tokens: int, tp: int) -> list[int]:
    """Tokens of the captured steps that are no decode steps, of steps of up to so many tokens."""
    sizes = [*CHUNK_TOKENS, *(SHARED_CHUNK_TOKENS if tp > 1 else ())]
    if tp > 1 or step_tokens < sizes[-1]:
        sizes.append(step_tokens)
    return sorted({size for size in sizes if size <= step_tokens})


def shapes_of(sizes: Sequence[int], max_num_seqs: int, block: Block) -> list[Shape]:
    """Of the parts of a captured step, of so many tokens each: decodes come in the first."""
    seats = [min(size, max_num_seqs) for size in sizes]
    return [
        Shape(size, 0 if i else most, GRAPH_PROMPTS, most, block)
        for i, (size, most) in enumerate(zip(sizes, seats, strict=True))
    ]


def fitting(
    chunks: Mapping[int, Sequence[Shape]], rows: Sequence[Row], tokens: int
) -> tuple[int, list[list[Row]]] | None:
    """The captured size, of these, that a step of so many tokens fits and fills; and its rows by part."""
    size = next((size for size in chunks if size >= tokens), None)
    if size is None or (size > SHORT_TOKENS and tokens < LEAST_FILLED * size):
        return None
    shapes = chunks[size]
    parts = [list(rows)] if len(shapes) == 1 else list(halves(rows, shapes[0].tokens))
    fits = all(shape.takes(part) for shape, part in zip(shapes, parts, strict=True))
    return (size, parts) if fits else None


def told_of_parts(
    parts: Sequence[Sequence[Row]], shapes: Sequence[Shape], slots: Slots, scratch: int
) -> Ints32:
    """The parts' tokens, one part after the other."""
    told = [
        told_of_rows(part, slots, shape.tokens, scratch).reshape(-1)
        for part, shape in zip(parts, shapes, strict=True)
    ]
    return np.concatenate(told)


def numbers_of_parts(
    parts: Sequence[Sequence[Row]], shapes: Sequence[Shape], seats: int, scratch: int
) -> Ints32:
    """The slots that sample, and where among the parts' samples each of them is; then the parts' numbers."""
    keep, pick = np.full(seats, scratch, dtype=np.int32), np.zeros(seats, dtype=np.int32)
    at = first = 0
    for part, shape in zip(parts, shapes, strict=True):
        slots = [row.slot for row in part if row.samples]
        keep[at : at + len(slots)] = slots
        pick[at : at + len(slots)] = np.arange(first, first + len(slots))
        at, first = at + len(slots), first + shape.samples
    numbers = [numbers_of(part, shape) for part, shape in zip(parts, shapes, strict=True)]
    return np.concatenate([keep, pick, *numbers])
