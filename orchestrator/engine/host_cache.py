"""KV blocks of one rank in host memory, and their copies: the doing of what the scheduler decided (host_blocks.py).

A block is in as many pieces on the device as keys and values have layers. They are gathered in a small buffer there, in
turn with the steps, and leave from it, on a stream of their own, in one piece: a step may write over a block as soon as
it is in the buffer. What comes goes through a buffer too, and a stream of its own, beside the step that computes; the
next step waits for it. Copies are no part of a CUDA graph: they go before it. On a CPU they are plain copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from orchestrator.engine.host_memory import paged, pin
from orchestrator.engine.kv_cache import KVCache
from orchestrator.engine.queues import Mark, Queue, queues
from orchestrator.step import Move, Step

BUFFER_BYTES = 16_000_000
"""Of each of the three buffers: 0.3 ms of a PCIe 5.0 link, many times what it takes to start a copy."""
BUFFERS = 3  # two for what leaves: one is filled while the other is emptied


def buffered_blocks(block_bytes: int) -> int:
    return max(1, BUFFER_BYTES // block_bytes)


def buffer_bytes(block_bytes: int) -> int:
    """What a rank takes of its device for the copies."""
    return BUFFERS * buffered_blocks(block_bytes) * block_bytes


class HostCache:
    """Tensors are [blocks, parts, words], as KVCache.by_block has them."""

    def __init__(self, cache: KVCache, num_blocks: int, on: tuple[Queue, Queue, Queue] | None = None) -> None:
        """`num_blocks` of host memory. `on`: the steps' queue, and those for what leaves and what comes."""
        self._device_BPW = cache.by_block()
        shape, dtype, device = self._device_BPW.shape[1:], self._device_BPW.dtype, self._device_BPW.device
        block_bytes = shape.numel() * dtype.itemsize
        self._memory = paged(num_blocks * block_bytes)  # locked for as long as this very tensor is there
        if device.type == "cuda":
            pin(self._memory)
        self._host_BPW = self._memory.view(dtype).view(num_blocks, *shape)
        self._buffered = buffered_blocks(block_bytes)
        self._steps, self._out, self._in = on or queues(device)
        *self._leaving, self._coming = (
            torch.empty((self._buffered, *shape), dtype=dtype, device=device) for _ in range(BUFFERS)
        )
        self._left: list[Mark | None] = [None] * len(self._leaving)  # when each buffer is empty again
        self._turn = 0  # of those buffers
        self._landed: Mark | None = None  # all that was sent for; None: the steps have waited for it
        if device.type == "cuda":
            self._warm_up(cache.scratch_block)

    def _warm_up(self, scratch: int) -> None:
        """CUDA loads kernels at their first use, other ones for few blocks than for many, and waits for the device."""
        for count in (1, self._buffered):
            moves = [Move(scratch, 0)] * count
            self._save(moves)
            self._load(moves)
        torch.cuda.synchronize(self._device_BPW.device)

    @torch.inference_mode()
    def move(self, step: Step) -> None:
        """A step's copies, before its rows are run. They are in order with those of the steps before and after."""
        self._await_loads()
        for moves in _chunks(step.saves, self._buffered):
            self._save(moves)
        loads = [move for admit in step.admits for move in admit.loads]
        if not loads:
            return
        self._in.wait(self._steps.mark())  # blocks that come take the places of others
        self._in.wait(self._out.mark())  # what has just left may come back
        for moves in _chunks(loads, self._buffered):
            self._load(moves)
        self._landed = self._in.mark()
        if reads(step, {move.device for move in loads}):
            self._await_loads()

    def _await_loads(self) -> None:
        if self._landed is not None:
            self._steps.wait(self._landed)
            self._landed = None

    def _save(self, moves: Sequence[Move]) -> None:
        staged, left = self._leaving[self._turn][: len(moves)], self._left[self._turn]
        if left is not None:
            self._steps.wait(left)
        self._steps.do(lambda: torch.index_select(self._device_BPW, 0, self._places(moves), out=staged))

        def leave() -> None:
            for at, first, count in runs([move.host for move in moves]):
                self._host_BPW[first : first + count].copy_(staged[at : at + count], non_blocking=True)

        self._out.wait(self._steps.mark())
        self._out.do(leave)
        self._left[self._turn] = self._out.mark()
        self._turn = (self._turn + 1) % len(self._leaving)

    def _load(self, moves: Sequence[Move]) -> None:
        staged = self._coming[: len(moves)]

        def come() -> None:
            for at, first, count in runs([move.host for move in moves]):
                staged[at : at + count].copy_(self._host_BPW[first : first + count], non_blocking=True)
            self._device_BPW.index_copy_(0, self._places(moves), staged)

        self._in.do(come)

    def _places(self, moves: Sequence[Move]) -> Tensor:
        """The moves' blocks of the device, on it."""
        places, device = torch.tensor([move.device for move in moves]), self._device_BPW.device
        return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places


def reads(step: Step, loaded: set[int]) -> bool:
    """Whether a row of the step wants blocks that come in it. Only what it admits can: the blocks were free."""
    computed = {row.slot for row in step.rows}
    return any(not loaded.isdisjoint(admit.blocks) for admit in step.admits if admit.slot in computed)


def runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Of blocks that follow each other, a copy each: its place among `blocks`, its first block, how many there are."""
    bounds = [0, *(np.flatnonzero(np.diff(blocks) != 1) + 1).tolist(), len(blocks)]
    for at, end in pairwise(bounds):
        yield at, blocks[at], end - at


def _chunks(moves: Sequence[Move], size: int) -> Iterator[Sequence[Move]]:
    return (moves[at : at + size] for at in range(0, len(moves), size))
