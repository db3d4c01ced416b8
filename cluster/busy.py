"""How much of a CPU's time other programs leave, seen by wanting all of it for a moment."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from cluster.discover import usable_cores
from cluster.topology import Topology

LOOK_S = 1.0  # schedulers take turns of some ms
NEARLY_ALL = 0.95  # more is an idle machine
_BLOCK = bytes(1 << 23)  # some ms of hashing, in which other threads run


def with_what_is_left(topology: Topology, seconds: float = LOOK_S) -> Topology:
    """A CPU's devices with the share of its time that was left just now; others as they are."""
    if topology.devices[0].kind != "cpu":
        return topology
    share = share_left(usable_cores(), seconds)
    if share >= NEARLY_ALL:
        return topology
    return replace(topology, devices=tuple(replace(d, free_share=share) for d in topology.devices))


def share_left(cores: int, seconds: float) -> float:
    """Of the time of so many threads that never rest, what they ran."""
    with ThreadPoolExecutor(cores) as threads:
        shares = list(threads.map(lambda _: _share(seconds), range(cores)))
    return min(1.0, sum(shares) / cores)


def _share(seconds: float) -> float:
    began, ran = time.perf_counter(), time.thread_time()
    while (passed := time.perf_counter() - began) < seconds:
        hashlib.sha256(_BLOCK).digest()
    return (time.thread_time() - ran) / passed
