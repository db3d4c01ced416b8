"""Replicas where they are placed: who took each rank, and what a coordinator that was killed has left of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cluster.errors import ShardwiseError
from cluster.gang import Call, Gang, Member, results
from launch.options import EngineOptions
from launch.progress import Progress
from launch.version import our_version
from orchestrator.scheduler import SchedulerConfig
from strategies.plan import ParallelDims, Shard

CALL_TIMEOUT_S = 120.0
REST_TIMEOUT_S = 60.0  # for the steps of a coordinator that was killed to end


class Ready(NamedTuple):
    """Replicas that have their weights and their cache."""

    limits: SchedulerConfig
    weight_bytes: Sequence[int]  # of each rank, replica by replica
    shards: Sequence[Shard]  # of each rank of a replica


@dataclass(frozen=True, slots=True)
class Placed:
    """A replica's gang and the member that took each rank."""

    gang: Gang
    ranks: tuple[int, ...]

    def member(self, rank: int) -> Member:
        return self.gang.members[self.ranks[rank]]

    def call(self, rank: int, method: str, *args: object) -> Call:
        return self.gang.call(self.ranks[rank], method, *args)


def ranks_of(gang: Gang) -> tuple[int, ...]:
    """The member that takes each rank: by node and device, so that a tp group's neighbours are near each other."""
    return tuple(m.index for m in sorted(gang.members, key=lambda m: (m.node_id, m.device)))


def everywhere(placed: Sequence[Placed], method: str, *args: object) -> list[Call]:
    return [replica.call(rank, method, *args) for replica in placed for rank in range(len(replica.ranks))]


def kill_all(gangs: Sequence[Gang]) -> None:
    for gang in gangs:
        gang.kill()


def rested(gangs: Sequence[Gang], dims: ParallelDims, name: str, progress: Progress) -> Ready | None:
    """What a killed coordinator has left, ready for this one. None, and nothing of it, where that is not all."""
    try:
        if len(gangs) == dims.dp:
            placed = [Placed(gang, ranks_of(gang)) for gang in gangs]
            # The leaders first: their last steps want followers.
            leaders: list[SchedulerConfig] = results([p.call(0, "rest") for p in placed], REST_TIMEOUT_S)
            results([p.call(r, "rest") for p in placed for r in range(1, dims.replica_size)], REST_TIMEOUT_S)
            weight_bytes = results(everywhere(placed, "weight_bytes"), CALL_TIMEOUT_S)
            shards = results(everywhere(placed[:1], "its_shard"), CALL_TIMEOUT_S)
            progress.say(f"{name}: the replicas of the server before are here, and loaded")
            return Ready(min(leaders, key=lambda limits: limits.num_blocks), weight_bytes, shards)
    except ShardwiseError as error:
        progress.say(f"{name}: what the server before left cannot be used: {error}")
    kill_all(gangs)
    return None


def terms_of(options: EngineOptions, dims: ParallelDims) -> str:
    """Equal where another coordinator would start the same workers. How a plan cut the layers is theirs to tell: the
    next coordinator has no plan, since no device is free for one."""
    told = repr((our_version(), options, dims))
    return hashlib.sha256(told.encode()).hexdigest()
