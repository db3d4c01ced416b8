"""The answer, as data: which layout, what each rank holds, what it will cost, and why the others lost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.errors import BadLayout
from cluster.topology import Device, Topology
from strategies.engines import Engine
from strategies.formats import KV_FLOAT8, PLAIN, Format, format_named
from strategies.offload import Room
from strategies.spec import ModelSpec

_NAME = re.compile(r"(tp|pp|dp|ep)(\d+)")


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """How many ways each dimension splits. A replica is tp × pp ranks; there are dp replicas.

    ep is how many ways a stage's experts are split whole: over the ranks of one replica (ep ≤ tp, each part then
    split tp/ep ways within its experts), or over those of all replicas (ep = tp × dp), whose tokens then meet at
    every mixture.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def replica_size(self) -> int:
        return self.tp * self.pp

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def name(self) -> str:
        sizes = (("tp", self.tp), ("pp", self.pp), ("dp", self.dp))
        plain = "".join(f"{key}{n}" for key, n in sizes if n > 1) or "tp1"
        return f"{plain}ep{self.ep}" if self.ep > 1 else plain

    @property
    def expert_ranks(self) -> int:
        """That hold a stage's experts between them."""
        return self.tp if self.ep <= self.tp else self.tp * self.dp

    @property
    def without_ep(self) -> ParallelDims:
        return replace(self, ep=1)

    @classmethod
    def parse(cls, name: str) -> ParallelDims:
        """`tp2pp2dp2` → ParallelDims(2, 2, 2): a layout of sizes alone. Raises BadLayout."""
        layout = Layout.parse(name)
        if layout.name != layout.dims.name or layout.dims.ep > 1:
            raise BadLayout(
                f"layout {name!r} can be planned, not run, by this version; run a plain one such as "
                f"{replace(layout.dims, ep=1).name}"
            )
        return layout.dims


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is split, in what it is kept, and whether what does not fit stays in host memory.

    `zero3`: all of it does, split over the ranks, and DeepSpeed's ZeRO-3 gathers it layer by layer: beside ours.
    """

    dims: ParallelDims
    format: Format = PLAIN
    offload: bool = False
    zero3: bool = False

    @property
    def name(self) -> str:
        if self.zero3:
            return f"zero3{self.dims.name if self.dims.world_size > 1 else ''}+offload"
        return f"{self.dims.name}{self.format.suffix}{'+offload' if self.offload else ''}"

    @property
    def is_plain(self) -> bool:
        """In the model's own dtype, all of it on the devices, experts where their layer's tp group is."""
        return self.format is PLAIN and not self.offload and self.dims.ep == 1

    @classmethod
    def parse(cls, name: str) -> Layout:
        """`tp8ep8+fp8`, `tp2+int4+offload`, `zero3tp2+offload`. Raises BadLayout."""
        base, *suffixes = name.strip().lower().split("+")
        if base.startswith("zero3"):
            return cls(_zero3_dims(name, base.removeprefix("zero3"), suffixes), offload=True, zero3=True)
        found = _NAME.findall(base)
        sizes = {key: int(n) for key, n in found}
        if not found or "".join(k + n for k, n in found) != base or len(sizes) != len(found):
            raise BadLayout(f"layout {name!r} is not a name such as tp2, pp2, dp2 or tp2pp2dp2")
        if min(sizes.values()) < 1:
            raise BadLayout(f"layout {name!r}: every size must be at least 1")
        dims = ParallelDims(**sizes)
        if dims.ep > 1 and (dims.tp % dims.ep if dims.ep <= dims.tp else dims.ep != dims.tp * dims.dp):
            raise BadLayout(
                f"layout {name!r}: ep must divide tp or equal tp × dp, {dims.tp * dims.dp}; it is {dims.ep}"
            )
        offload = bool(suffixes) and suffixes[-1] == "offload"
        formats = suffixes[:-1] if offload else suffixes
        if "offload" in formats:
            right = "+".join((base, *dict.fromkeys(kept for kept in formats if kept != "offload"), "offload"))
            raise BadLayout(f"layout {name!r}: +offload comes last, and once: {right}")
        of_weights = [kept for kept in formats if kept != KV_FLOAT8]
        if len(of_weights) > 1 or len(formats) > len(of_weights) + 1:
            raise BadLayout(
                f"layout {name!r} names {len(formats)} formats; it may have one, such as +fp8, and +{KV_FLOAT8}"
            )
        kept = format_named(of_weights[0], name) if of_weights else PLAIN
        return cls(dims, kept.with_float8_kv() if KV_FLOAT8 in formats else kept, offload)


def _zero3_dims(name: str, ranks: str, suffixes: Sequence[str]) -> ParallelDims:
    found = Layout.parse(ranks or "tp1").dims
    if suffixes != ["offload"] or found != ParallelDims(tp=found.tp):
        raise BadLayout(
            f"layout {name!r}: ZeRO-3 is zero3+offload on one device, zero3tp2+offload on two, and so on"
        )
    return found


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
class Placement:
    """A layout put on devices. `devices` holds indices by replica × replica_size + rank."""

    spec: ModelSpec
    dims: ParallelDims
    dtype: str
    shards: tuple[Shard, ...]
    topology: Topology
    devices: tuple[int, ...]
    engine: Engine
    format: Format = PLAIN
    offload: bool = False
    zero3: bool = False
    room: Room = Room()  # noqa: RUF009 (frozen)

    @property
    def layout(self) -> Layout:
        return Layout(self.dims, self.format, self.offload, self.zero3)

    def device(self, replica: int, rank: int) -> Device:
        return self.topology.devices[self.devices[replica * self.dims.replica_size + rank]]

    def stage(self, replica: int, stage: int) -> tuple[int, ...]:
        """Device indices of a stage's tp group."""
        first = replica * self.dims.replica_size + stage * self.dims.tp
        return self.devices[first : first + self.dims.tp]

    def pool_ranks(self, device: Device) -> int:
        """Ranks of the layout that share a device's bandwidth, FLOP/s and memory, itself among them."""
        if not device.pool:
            return 1
        return sum(self.topology.devices[i].pool == device.pool for i in self.devices)


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
    spread: float = 0.0  # of TPOT and throughput, as a share: what nine of ten measured ones lie within
    source: str = "model"  # or that it was measured here, or scaled by what was
    memory_parts: Mapping[str, int] = field(
        default_factory=dict
    )  # of the fullest device: weights, kv, activations, runtime


@dataclass(frozen=True, slots=True)
class Candidate:
    dims: ParallelDims
    reason: str | None  # why it is infeasible, as arithmetic; None if it is feasible
    estimate: Estimate | None
    shards: tuple[Shard, ...] = ()  # one a rank of a replica, by rank
    marked: tuple[str, ...] = ()  # notes on the estimate, such as replicated KV heads
    devices: tuple[int, ...] = ()  # indices in Topology.devices, by replica × replica_size + rank
    format: Format = PLAIN
    offload: bool = False
    zero3: bool = False
    not_runnable: str | None = None  # why this version can plan it but not run it

    @property
    def layout(self) -> Layout:
        return Layout(self.dims, self.format, self.offload, self.zero3)

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
