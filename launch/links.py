"""Before GPUs are put to work together: what was proved of their links, and NCCL told to keep to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.paths import Path
from cluster.proof import kept
from cluster.prove import proved
from cluster.topology import Topology
from launch.machine import cache_directory, found_here
from launch.options import EngineOptions
from launch.progress import Progress


def linked(options: EngineOptions, devices: int) -> Topology | None:
    """The GPUs here; None where there is nothing to prove: CPUs, one GPU, or a cluster elsewhere."""
    if options.device != "cuda" or devices < 2 or options.address is not None:
        return None
    return found_here("cuda", peer_access=options.peer_access)


@contextmanager
def only_proved(options: EngineOptions, devices: int, progress: Progress) -> Iterator[None]:
    """Proves the links if they never were. What is started inside inherits the environment that keeps NCCL to those
    that work.
    """
    topology = linked(options, devices)
    told = {} if topology is None else dict(proved(topology, cache_directory(), progress.say).environment)
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def peers_trusted(options: EngineOptions, devices: int) -> bool:
    """Whether small sums may go through the GPUs' own memory: not where the proof failed."""
    topology = linked(options, devices)
    proof = None if topology is None else kept(cache_directory(), topology)
    return options.peer_access and (proof is None or Path.PEER in proof.paths)
