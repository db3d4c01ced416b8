"""Before GPUs are put to work together: what was proved of their links, and NCCL told to keep to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.paths import ONE_SHOT_PATHS, Path, gains_up_to
from cluster.profile import kept as kept_profile
from cluster.proof import kept
from cluster.prove import proved
from cluster.topology import Topology
from launch.machine import cache_directory, found_here
from launch.options import EngineOptions
from launch.progress import Progress
from strategies.plan import ParallelDims


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


def small_sums(options: EngineOptions, dims: ParallelDims) -> dict[str, int | None]:
    """Ways beside NCCL that sums over tp may go, by what was proved, and the bytes up to which they are faster, by what
    was measured; None where that was not."""
    ways = [path for path in ONE_SHOT_PATHS if options.peer_access or path is not Path.PEER]
    topology = linked(options, dims.world_size)
    if topology is None:
        return dict.fromkeys(map(str, ways))
    proof, profile = kept(cache_directory(), topology), kept_profile(cache_directory(), topology)
    curves = () if profile is None else profile.curves
    trusted = [path for path in ways if proof is None or path in proof.paths]
    return {str(path): gains_up_to(curves, path, dims.tp) for path in trusted}
