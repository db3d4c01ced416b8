"""One engine step, as it travels from the leader to every rank. A prompt's tokens travel once, when admitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from orchestrator.request import SamplingParams, TokenLogprobs


class Move(NamedTuple):
    """A KV block's copy between the device and host memory."""

    device: int
    host: int


class Admit(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a slot: what the ranks must remember of it until the slot is taken by another."""

    slot: int
    token_ids: list[int]  # all that are known: the prompt, and after a preemption the output so far
    prompt_tokens: int
    blocks: list[int]  # KV blocks for all of token_ids
    sampling: SamplingParams
    stop_ids: list[int]  # banned until min_tokens are out
    loads: list[Move] = []  # of its blocks, those that come from host memory


class Row(msgspec.Struct, frozen=True, array_like=True):
    """Positions start … start+count-1 of one sequence, to be computed in this step."""

    slot: int
    start: int
    count: int
    samples: bool  # the last position's logits give a new token
    token_id: int  # at `start`, if the ranks may not have seen it yet; else -1
    new_block: int  # the KV block of `start`, if it was added since the admission; else -1
    mask: bytes = b""  # of tokens that a grammar allows, a bit each, the lowest id first; empty: all


class Step(msgspec.Struct, frozen=True, array_like=True):
    """Ranks do what is in it in this order: saves, loads, rows."""

    id: int
    admits: list[Admit]
    rows: list[Row]
    saves: list[Move] = []  # KV blocks that leave for host memory


NOT_FINITE = -2  # instead of a token, where there are no numbers to sample it from


class StepResult(msgspec.Struct, frozen=True, array_like=True):
    """Sampled tokens, one for each row that samples, in the rows' order."""

    id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None] | None = None


def halves(rows: Sequence[Row], first: int | None = None) -> tuple[list[Row], list[Row]]:
    """The rows' tokens in two parts, in their order; a row that lies across is cut.

    `first`: tokens of the first part; None: about half of them.
    """
    parts: tuple[list[Row], list[Row]] = [], []
    left = sum(row.count for row in rows) // 2 if first is None else first
    for row in rows:
        if 0 < left < row.count:
            parts[0].append(Row(row.slot, row.start, left, False, row.token_id, row.new_block))
            parts[1].append(Row(row.slot, row.start + left, row.count - left, row.samples, -1, -1))
        else:
            parts[left <= 0].append(row)
        left -= row.count
    return parts


def whole_prompts(prompts: Sequence[list[int]], block_size: int) -> Step:
    """A step that runs prompts whole, in the first slots and the first blocks, outside any schedule."""
    admits: list[Admit] = []
    at = 0
    for slot, token_ids in enumerate(prompts):
        end = at + -(-len(token_ids) // block_size)
        admits.append(Admit(slot, token_ids, len(token_ids), list(range(at, end)), SamplingParams(), []))
        at = end
    return Step(0, admits, [Row(a.slot, 0, a.prompt_tokens, True, -1, -1) for a in admits])
