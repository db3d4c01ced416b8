"""The greedy token: index of the largest logit of each row, in two launches.

One program a row would leave a lone row, half a megabyte of logits, to one of the GPU's multiprocessors.

Dimensions: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 4096  # logits of a program: at 8 warps 16 a thread


@triton.jit
def _largest(values, places):
    """The largest value and, of those equal, the lowest place; a nan is never the largest."""
    values = tl.where(values == values, values, float("-inf"))
    largest = tl.max(values, axis=0)
    return largest, tl.min(tl.where(values == largest, places, 2147483647), axis=0)


@triton.jit
def _part_argmax(logits, part_largest, part_places, VOCAB, PART: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = part * PART + tl.arange(0, PART)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(logits + row * VOCAB + place, mask=place < VOCAB, other=float("-inf")).to(tl.float32)
    largest, largest_place = _largest(value, place)
    slot = row * tl.num_programs(1) + part
    tl.store(part_largest + slot, largest)
    tl.store(part_places + slot, largest_place)


@triton.jit
def _combine(part_largest, part_places, out, PARTS, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    inside = part < PARTS
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(part_largest + row * PARTS + part, mask=inside, other=float("-inf"))
    place = tl.load(part_places + row * PARTS + part, mask=inside, other=2147483647)
    _, largest_place = _largest(value, place)
    tl.store(out + row, largest_place.to(tl.int64))


def argmax(logits_RV: Tensor, *, pdl: bool = False) -> Tensor:
    """→ int64 [R]: the lowest index among equals. A nan counts as -inf, so the index is always in the vocabulary."""
    rows, vocab = logits_RV.shape
    parts = triton.cdiv(vocab, PART)
    part_largest = torch.empty((rows, parts), dtype=torch.float32, device=logits_RV.device)
    part_places = torch.empty((rows, parts), dtype=torch.int32, device=logits_RV.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits_RV.device)
    _part_argmax[(rows, parts)](
        logits_RV, part_largest, part_places, vocab, PART=PART, PDL=pdl, num_warps=8, launch_pdl=pdl
    )
    block = triton.next_power_of_2(parts)
    _combine[(rows,)](
        part_largest, part_places, out, parts, BLOCK=block, PDL=pdl, num_warps=1, launch_pdl=pdl
    )
    return out
