"""Before GPUs are put to work together: what was proved of their links, and NCCL told to keep to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

from cluster.errors import GangDied, PlacementFailed
from cluster.paths import ONE_SHOT_PATHS, Path, gains_up_to
from cluster.profile import kept as kept_profile
from cluster.proof import Outcome, kept
from cluster.prove import Rung, proved, proved_further
from cluster.topology import Topology
from launch.machine import cache_directory, found_here
from launch.options import EngineOptions
from launch.progress import Progress
from orchestrator.engine_config import EngineConfig
from orchestrator.first_layer import differs
from strategies.plan import ParallelDims

LAYER_LIMIT_S = 60.0  # of silence: kernels are compiled meanwhile


def linked(options: EngineOptions, devices: int) -> Topology | None:
    """The GPUs here; None where there is nothing to prove: CPUs, one GPU, or a cluster elsewhere."""
    if options.device != "cuda" or devices < 2 or options.address is not None:
        return None
    return _gpus(options.peer_access)


@cache
def _gpus(peer_access: bool) -> Topology:
    """Read once: a tenth of a second each, and what a start goes by must not change on its way."""
    return found_here("cuda", peer_access=peer_access)


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


def prove_first_layer(
    options: EngineOptions, dims: ParallelDims, config: EngineConfig, progress: Progress
) -> None:
    """Once for each model, dtype and tp on this machine: over the ways that `config` has, and where its first layer
    comes out wrong over the fastest, over the next. What fails is trusted no more. Raises GangDied where all fail,
    PlacementFailed where one has no memory.
    """
    topology = linked(options, dims.world_size)
    if topology is None or dims.tp == 1 or options.compatible:
        return
    proof = proved(topology, cache_directory(), progress.say)
    kind = f"{options.dtype}+{options.format}" if options.format else options.dtype
    name = f"first layer of {options.spec.name}, {kind}, at tp{dims.tp}"
    ways = [path for path in ONE_SHOT_PATHS if str(path) in config.ways]
    rungs: list[Rung] = []
    for number, path in enumerate([*ways, Path.NCCL]):
        left = {str(way): config.ways[str(way)] for way in ways[number:]}
        job = partial(differs, config=replace(config, ways=left), tp=dims.tp)
        before = rungs[-1].name if rungs else None
        rungs.append(Rung(f"{name}, {path}", path, job, instead_of=before, limit_s=LAYER_LIMIT_S))
    if rungs[0].name not in {step.rung for step in proof.steps}:
        proof = proved_further(proof, topology, dims.tp, rungs, cache_directory(), progress.say)
    steps = [step for step in proof.steps if step.rung.startswith(f"{name}, ")]
    if (full := next((step for step in steps if step.outcome is Outcome.MEMORY), None)) is not None:
        raise PlacementFailed(
            f"no memory for the {name}: {full.evidence}; free it (`shardwise doctor` says who holds it), "
            "or take a layout that needs less of each GPU"
        )
    last = steps[-1]
    if last.outcome is not Outcome.PASSED:
        raise GangDied(f"{last.rung}: {last.evidence}; use a replica a GPU (--layout dp{dims.world_size})")


def ways_beside_nccl(options: EngineOptions, dims: ParallelDims) -> dict[str, int | None]:
    """What a replica may use beside NCCL, by what was proved, and the bytes up to which sums over tp gain by it,
    by what was measured; None where that was not."""
    ways = [path for path in ONE_SHOT_PATHS if options.peer_access or path is not Path.PEER]
    topology = linked(options, dims.world_size)
    if topology is None:
        return dict.fromkeys(map(str, ways))
    proof, profile = kept(cache_directory(), topology), kept_profile(cache_directory(), topology)
    curves = () if profile is None else profile.curves
    trusted = [path for path in ways if proof is None or path in proof.paths]
    return {str(path): gains_up_to(curves, path, dims.tp) for path in trusted}
