"""The KV cache's second tier: which prefixes host memory holds, what comes and what goes. The bytes are elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from orchestrator.step import Move


class HostPool:
    """Blocks 0 … n-1 of host memory by the prefix that each holds; the one wanted longest ago gives way to a new one.

    What one step reads or writes gives way to nothing else in that step, whose ranks save before they load.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.saved = self.loaded = 0  # blocks, so far
        self._free = list(reversed(range(num_blocks)))
        self._block_of: OrderedDict[bytes, int] = OrderedDict()  # wanted longest ago first
        self._wanted: set[bytes] = set()  # in this step
        self._saves: list[Move] = []  # of this step

    def __contains__(self, key: object) -> bool:
        return key in self._block_of

    def hold(self, keys: Iterable[bytes]) -> None:
        """These are wanted: nothing takes their place in this step."""
        for key in keys:
            self._block_of.move_to_end(key)
            self._wanted.add(key)

    def load(self, key: bytes, device: int) -> Move:
        """To block `device` of the device. Host memory keeps it: it need not be copied out again."""
        self.loaded += 1
        return Move(device, self._block_of[key])

    def save(self, device: int, key: bytes) -> bool:
        """Keep what block `device` of the device holds. → whether by a copy: not where it is here, or no room is."""
        if key in self._block_of:
            self.hold([key])
            return False
        if self._free:
            block = self._free.pop()
        else:
            oldest = next(iter(self._block_of), None)
            if oldest is None or oldest in self._wanted:
                return False
            block = self._block_of.pop(oldest)
        self._block_of[key] = block
        self._wanted.add(key)
        self._saves.append(Move(device, block))
        self.saved += 1
        return True

    def forget(self, keys: Iterable[bytes]) -> None:
        """Nobody finds these any more."""
        for key in keys:
            if (block := self._block_of.pop(key, None)) is not None:
                self._free.append(block)

    def end_step(self) -> list[Move]:
        """What the step copies out before all else."""
        saves, self._saves = self._saves, []
        self._wanted.clear()
        return saves
