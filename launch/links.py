"""Before GPUs are put to work together: what was proved of their links, and NCCL told to keep to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.discover import discover
from cluster.paths import Path
from cluster.proof import Proof
from cluster.prove import proved
from launch.options import EngineOptions
from launch.predict import cache_directory
from launch.progress import Progress


def proof_of(options: EngineOptions, devices: int, progress: Progress) -> Proof | None:
    """Kept, or made now; None where there is nothing to prove: CPUs, one GPU, or a cluster elsewhere."""
    if options.device != "cuda" or devices < 2 or options.address is not None:
        return None
    topology = discover(
        device="cuda", peer_access=options.peer_access, visible=os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    return proved(topology, cache_directory(), progress.say)


@contextmanager
def only_proved(options: EngineOptions, devices: int, progress: Progress) -> Iterator[None]:
    """What is started inside inherits the environment that keeps NCCL to the ways that work here."""
    proof = proof_of(options, devices, progress)
    told = {} if proof is None else dict(proof.environment)
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


def peers_proved(options: EngineOptions, devices: int, progress: Progress) -> bool:
    """Whether small sums may go through the GPUs' own memory."""
    proof = proof_of(options, devices, progress)
    return options.peer_access and (proof is None or Path.PEER in proof.paths)
