"""The most memory that was held on a GPU while something ran, as the driver sees it: graphs and NCCL too."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from cluster.nvml import read_gpus

EVERY_S = 0.5


def visible(count: int, environment: Mapping[str, str] = os.environ) -> list[int]:
    """The first `count` GPUs that a child will see, in the driver's order."""
    named = [int(i) for i in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if i.strip().isdigit()]
    return (named or list(range(count)))[:count]


def held_bytes(indices: list[int]) -> int:
    """On the fullest of them; 0 where there are none."""
    gpus = {gpu.index: gpu for gpu in read_gpus().gpus}
    return max((gpus[i].memory_bytes - gpus[i].free_bytes for i in indices if i in gpus), default=0)


@contextmanager
def most_held(indices: list[int]) -> Iterator[list[int]]:
    """Fills the list with the most bytes, at the end."""
    found, over, most = [], threading.Event(), [held_bytes(indices)]

    def watch() -> None:
        while not over.wait(EVERY_S):
            most.append(held_bytes(indices))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    yield found
    over.set()
    watching.join()
    found.append(max(most))
