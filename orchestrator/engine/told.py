"""What the host tells the GPU of a step, in numbers: padded where a graph wants more rows or tokens than there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.engine.slots import Slots, positions, sampling_ends
from orchestrator.step import Row

Ints32 = NDArray[np.int32]

FIELDS = 4  # of a token: its slot, position, id (-1: the newest that the slot sampled), new block (-1: none)


@dataclass(frozen=True, slots=True)
class Block:
    """What one program of prefill's attention works on: query rows, of which each token has `group`."""

    rows: int
    group: int

    def count(self, tokens: int) -> int:
        """Of programs for so many tokens of one sequence."""
        return -(-tokens * self.group // self.rows)


@dataclass(frozen=True, slots=True)
class Shape:
    """How much of everything a graph has room for, in one part of a step."""

    tokens: int
    decodes: int
    prompts: int
    samples: int
    block: Block

    @property
    def sizes(self) -> list[int]:
        """Of the numbers of `numbers_of`."""
        decodes, prompts = self.decodes, self.prompts
        blocks = self.block.count(self.tokens) + prompts  # each prompt's last one may be cut
        return [decodes, decodes, prompts, prompts, prompts + 1, self.samples, blocks, blocks]

    def takes(self, rows: Sequence[Row]) -> bool:
        """Of rows whose tokens fit."""
        leading = decodes_of(rows) if self.decodes else 0
        fits = leading <= self.decodes and len(rows) - leading <= self.prompts
        return fits and sum(row.samples for row in rows) <= self.samples


def decodes_of(rows: Sequence[Row]) -> int:
    """How many rows of one token lead."""
    return next((i for i, row in enumerate(rows) if row.count > 1), len(rows))


def numbers_of(rows: Sequence[Row], shape: Shape) -> Ints32:
    """What a graph is told of a part's rows beside their tokens, in one array.

    Slots and positions of the rows that decode (-1: nobody's); slots, starts and token offsets of those that compute
    several tokens, empty ones behind them; the last tokens of those that sample, the first token behind them; rows of
    the blocks of prompts' attention (-1: nobody's), and which of the row's blocks each is.
    """
    numbers = np.zeros(sum(shape.sizes), dtype=np.int32)
    slots, positions_, prompt_slots, starts, offsets, ends, block_rows, blocks = np.split(
        numbers, np.cumsum(shape.sizes)[:-1]
    )
    leading = decodes_of(rows) if shape.decodes else 0
    decodes, prompts = rows[:leading], rows[leading:]
    slots[:leading] = [row.slot for row in decodes]
    positions_[:leading] = [row.start for row in decodes]
    positions_[leading:] = -1
    prompt_slots[: len(prompts)] = [row.slot for row in prompts]
    starts[: len(prompts)] = [row.start for row in prompts]
    after = np.cumsum([leading, *(row.count for row in prompts)])
    offsets[: len(after)] = after
    offsets[len(after) :] = after[-1]
    sampled = sampling_ends(rows)
    ends[: len(sampled)] = sampled
    found = blocks_of(prompts, shape.block)
    block_rows[:] = -1
    block_rows[: len(found[0])], blocks[: len(found[1])] = found
    return numbers


def blocks_of(prompts: Sequence[Row], block: Block) -> tuple[Ints32, Ints32]:
    """The rows of all blocks and which of the row's blocks each is, those with the most keys first: an even end."""
    counts = np.array([row.count for row in prompts], dtype=np.int64)
    starts = np.array([row.start for row in prompts], dtype=np.int64)
    each = -(-counts * block.group // block.rows)
    rows = np.repeat(np.arange(len(prompts)), each)
    blocks = np.arange(len(rows)) - np.repeat(np.cumsum(each) - each, each)
    keys = starts[rows] + np.minimum(counts[rows], (blocks + 1) * block.rows // block.group)
    order = np.argsort(-keys, kind="stable")
    return rows[order].astype(np.int32), blocks[order].astype(np.int32)


def told_of_decodes(rows: Sequence[Row], slots: Slots, pad_to: int, scratch: int) -> Ints32:
    """[4, pad_to] of rows that compute one token each: told_of_rows, without 0.4 ms of the host at 256 rows."""
    told = np.empty((FIELDS, pad_to), dtype=np.int32)
    count = len(rows)
    told[0, :count] = [row.slot for row in rows]
    told[1, :count] = [row.start for row in rows]
    told[2, :count] = slots.token_ids(rows)
    told[3, :count] = [row.new_block for row in rows]
    told[:, count:] = [[scratch], [0], [0], [-1]]
    return told


def told_of_rows(rows: Sequence[Row], slots: Slots, pad_to: int, scratch: int) -> Ints32:
    """[4, pad_to] of any rows, in their order."""
    told = np.empty((FIELDS, pad_to), dtype=np.int32)
    counts = np.array([row.count for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    tokens = int(counts.sum())
    told[0, :tokens] = np.repeat([row.slot for row in rows], counts)
    told[1, :tokens] = positions(starts, counts)
    told[2, :tokens] = slots.token_ids(rows)
    told[3, :tokens] = np.repeat([row.new_block for row in rows], counts)  # only a row of one token has any
    told[:, tokens:] = [[scratch], [0], [0], [-1]]
    return told


def prompts_of(rows: Sequence[Row]) -> Ints32:
    """Slots, starts and token offsets of rows, in one array of 3 R + 1."""
    offsets = np.cumsum([0, *(row.count for row in rows)])
    return np.array(
        [*(row.slot for row in rows), *(row.start for row in rows), *offsets.tolist()], dtype=np.int32
    )
