"""The answer, as data: which layout, what each rank holds, what it will cost, and why the others lost."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import BadLayout

_NAME = re.compile(r"(tp|pp|dp)(\d+)")


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """How many ways each dimension splits. A replica is tp × pp ranks; there are dp replicas."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def replica_size(self) -> int:
        return self.tp * self.pp

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        parts = [f"{key}{n}" for key, n in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)) if n > 1]
        return "".join(parts) or "tp1"

    @classmethod
    def parse(cls, name: str) -> ParallelDims:
        """`tp2pp2dp2` → ParallelDims(2, 2, 2). Raises BadLayout."""
        base, _, suffix = name.strip().lower().partition("+")
        found = _NAME.findall(base)
        sizes = {key: int(n) for key, n in found}
        if not found or "".join(k + n for k, n in found) != base or len(sizes) != len(found):
            raise BadLayout(f"layout {name!r} is not a name such as tp2, pp2, dp2 or tp2pp2dp2")
        if min(sizes.values()) < 1:
            raise BadLayout(f"layout {name!r}: every size must be at least 1")
        if suffix:
            raise BadLayout(f"layout {name!r}: +{suffix} is not supported; plain layouts such as {base} are")
        return cls(**sizes)


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank of a replica holds, as ranges of the whole model. rank = stage × tp + tp_rank."""

    tp_rank: int
    tp: int
    stage: int
    pp: int
    layers: range
    heads: range  # query heads
    kv_heads: range  # the KV heads that those query heads read; replicated where tp exceeds the KV heads
    mlp: range  # columns of gate and up, rows of down
    vocab: range  # rows of the embedding and of the head

    @property
    def rank(self) -> int:
        return self.stage * self.tp + self.tp_rank

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.pp - 1


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a layout will do, predicted. Seconds and bytes."""

    ttft_s: float
    tpot_s: float
    output_tokens_per_s: float
    memory_bytes_per_device: int  # of the fullest device
    kv_tokens: int  # that fit a replica
    share_of_limit: float  # of the data sheet's bound; at most 1
    usd_per_million_tokens: float | None
    breakdown: Mapping[
        str, float
    ]  # decode step, seconds by cause: weights, kv, compute, all_reduce, send_recv, host


@dataclass(frozen=True, slots=True)
class Candidate:
    dims: ParallelDims
    reason: str | None  # why it is infeasible, as arithmetic; None if it is feasible
    estimate: Estimate | None
    shards: tuple[Shard, ...] = ()  # one a rank of a replica, by rank
    marked: tuple[str, ...] = ()  # notes on the estimate, such as replicated KV heads
    devices: tuple[int, ...] = ()  # indices in Topology.devices, by replica × replica_size + rank

    @property
    def feasible(self) -> bool:
        return self.reason is None


@dataclass(frozen=True, slots=True)
class Plan:
    model: str
    machine: str
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None
    explanation: tuple[str, ...]  # sentences: why the winner won, where it would lose
