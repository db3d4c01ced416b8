"""Overlap: two parts of a batch take turns on a device, so that one computes while the other's sum travels.

Each part runs the same unknowing transformer, as a coroutine that is left at every sum (greenlet: a switch costs less
than a microsecond and stays in the thread). Ranks take the same turns, so sums start in the same order everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from greenlet import getcurrent, greenlet

if TYPE_CHECKING:
    from torch import Tensor

    from cluster.collectives import StageGroup

T = TypeVar("T")


class Overlap:
    """The ranks of a stage, for a model whose batch may come in parts (satisfies tensor.Sums)."""

    def __init__(self, group: StageGroup) -> None:
        self._group = group
        self._turns: greenlet | None = None  # who gives them, while parts run

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self._turns is None:
            return self._group.all_reduce(tensor)
        summing = self._group.start_all_reduce(tensor)
        self._turns.switch()
        return summing.landed()

    def run(self, parts: Sequence[Callable[[], T]]) -> list[T]:
        """The results of the parts, which start in their order: what a part writes before a sum, the next may read
        after its own sum of the same number."""
        if len(parts) == 1:
            return [parts[0]()]
        found: dict[int, T] = {}

        def run_one(index: int) -> None:
            found[index] = parts[index]()

        running = [greenlet(partial(run_one, index)) for index in range(len(parts))]
        self._turns = getcurrent()
        try:
            while running:
                for part in running:
                    part.switch()
                running = [part for part in running if not part.dead]
        finally:
            self._turns = None
        return [found[index] for index in range(len(parts))]
