"""KV blocks: who holds which, which hold a known prefix, which may be taken. The bytes are elsewhere."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import islice


def block_hashes(tokens: Sequence[int], block_size: int, known: list[bytes]) -> list[bytes]:
    """Hashes of the full blocks of `tokens`, each over its own tokens and all before it; `known` are the first ones.

    16 bytes of BLAKE2b: a collision would answer from somebody else's prompt, so Python's 8-byte hash will not do.
    """
    hashes = list(known)
    for i in range(len(hashes), len(tokens) // block_size):
        parent = hashes[-1] if hashes else b""
        content = array("q", tokens[i * block_size : (i + 1) * block_size]).tobytes()
        hashes.append(hashlib.blake2b(parent + content, digest_size=16).digest())
    return hashes


class BlockPool:
    """Blocks 0 … n-1 with reference counts. A free block keeps its prefix until it is taken for something else.

    Free blocks are taken in the order in which they were freed: the prefix used longest ago goes first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        # Oldest first. A plain dict would search past everything ever taken from its front.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def match(self, hashes: Iterable[bytes], elsewhere: Container[bytes] = ()) -> list[int | None]:
        """Blocks that hold the longest known prefix, not yet held by the caller; None for what is only `elsewhere`."""
        found = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None and key not in elsewhere:
                break
            found.append(block)
        return found

    def count_free(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` nobody holds: holding them uses up free blocks."""
        return sum(1 for block in blocks if not self._references[block])

    def hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def take(self) -> tuple[int, bytes | None]:
        """A free block, held once, and the prefix that it held, now forgotten."""
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        key = self._hash_of.get(block)
        self.forget([block])
        return block, key

    def next_taken(self, count: int) -> Iterator[tuple[int, bytes]]:
        """Of the free blocks that are taken next, so many, those that hold a prefix."""
        return ((b, self._hash_of[b]) for b in islice(self._free, count) if b in self._hash_of)

    def name(self, block: int, key: bytes) -> None:
        """From now on `block` holds the prefix `key`, unless another block already does."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._hash_of[block] = key

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody finds a prefix in these any more."""
        for block in blocks:
            if (key := self._hash_of.pop(block, None)) is not None:
                del self._block_of[key]

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back. The last of a sequence go first, so that the start of a prefix is kept longest."""
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released more often than held"
            if not self._references[block]:
                self._free[block] = None
