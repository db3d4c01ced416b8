"""The most memory that was held on a GPU while something ran, as the driver sees it: graphs and NCCL too."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cluster.nvml import Binding, memory_watch

EVERY_S = 0.5


def visible(count: int, environment: Mapping[str, str] = os.environ) -> list[int]:
    """The first `count` GPUs that a child will see, in the driver's order."""
    named = [int(i) for i in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if i.strip().isdigit()]
    return (named or list(range(count)))[:count]


@contextmanager
def most_held(indices: list[int], binding: Binding = None, every_s: float = EVERY_S) -> Iterator[list[int]]:
    """Fills the list with the most bytes on the fullest of them, at the end; 0 where there are none."""
    found: list[int] = []
    over = threading.Event()
    with memory_watch(indices, binding) as held:
        most = [0, *held()]

        def watch() -> None:
            while not over.wait(every_s):
                most.extend(held())

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        try:
            yield found
        finally:
            over.set()
            watching.join()
        most.extend(held())
    found.append(max(most))
